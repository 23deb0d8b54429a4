"""Whether a state is one of a loop of your own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import TrainingError
from ..masks import Mask
from ..net.subnet_model import SubnetModel
from .state.compatibility import Foreign, check_classes, check_masks
from .state.configuration import differences

__all__ = ["check_loop_state"]


def check_loop_state(state: Any, net: SubnetModel, configuration: Mapping[str, Any], total: int) -> dict[str, Mask]:
    """See that a state is one of a loop.

    Args:
        state: What is to be loaded.
        net: The loop's.
        configuration: The loop's.
        total: Its steps in all.

    Returns:
        The masks in it.

    Raises:
        TrainingError: It is not; says what differs.
    """
    if not isinstance(state, Mapping) or state.get("format") != 1:
        found = state.get("format") if isinstance(state, Mapping) else type(state).__name__
        raise TrainingError(f"this is no state of a CoLoop that this release reads: format {found!r}")
    try:
        masks = _check_content(state, net, total)
    except Foreign as error:
        raise TrainingError(f"this is no state of a CoLoop: {error}") from error
    if lines := differences(state["configuration"], configuration):
        raise TrainingError(f"the state is of another loop ({'; '.join(lines)}): build the loop as it was")
    return masks


def _check_content(state: Mapping[str, Any], net: SubnetModel, total: int) -> dict[str, Mask]:
    kinds = {"configuration": Mapping, "masks": Mapping, "done": int, "entered": int}
    if wrong := [key for key, kind in kinds.items() if not isinstance(state.get(key), kind)]:
        raise Foreign(f"its {wrong[0]!r} is {type(state.get(wrong[0])).__name__}")
    if not 0 <= state["done"] <= total:
        raise Foreign(f"{state['done']} of {total} steps are done")
    check_classes(state.get("classes"))
    return check_masks(state["masks"], net)
