"""The state of a loop of your own, as tensors and plain values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from torch import Tensor

from ..errors import TrainingError
from ..masks import Mask
from ..net.subnet_model import SubnetModel
from .state.compatibility import Foreign, check_classes, check_masks
from .state.configuration import differences
from .state.encoding import pack_masks
from .step.distill import Classes

__all__ = ["check_loop_state", "loop_state"]


def loop_state(
    configuration: Mapping[str, Any], done: int, entered: int, classes: Classes | None, masks: Mapping[str, Mask]
) -> dict[str, Any]:
    """What ``CoLoop.state_dict`` returns.

    Args:
        configuration: The loop's.
        done: Optimizer steps done.
        entered: The last round whose masks are made.
        classes: Where the output holds class logits, if that is known.
        masks: Those of the rounds so far.
    """
    return {
        "format": 1,
        "configuration": configuration,
        "done": done,
        "entered": entered,
        "classes": None if classes is None else asdict(classes),
        "masks": pack_masks(masks),
    }


def check_loop_state(state: Any, net: SubnetModel, configuration: Mapping[str, Any], total: int) -> None:
    """See that a state is one of a loop.

    Args:
        state: What is to be loaded.
        net: The loop's.
        configuration: The loop's.
        total: Its steps in all.

    Raises:
        TrainingError: It is not; says what differs.
    """
    if not isinstance(state, Mapping) or state.get("format") != 1:
        found = state.get("format") if isinstance(state, Mapping) else type(state).__name__
        raise TrainingError(f"this is no state of a CoLoop that this release reads: format {found!r}")
    try:
        _check_content(state, net, total)
    except Foreign as error:
        raise TrainingError(f"this is no state of a CoLoop: {error}") from error
    if lines := differences(state["configuration"], configuration):
        raise TrainingError(f"the state is of another loop ({'; '.join(lines)}): build the loop as it was")


def _check_content(state: Mapping[str, Any], net: SubnetModel, total: int) -> None:
    kinds = {"configuration": Mapping, "masks": Mapping, "done": int, "entered": int}
    if wrong := [key for key, kind in kinds.items() if not isinstance(state.get(key), kind)]:
        raise Foreign(f"its {wrong[0]!r} is {type(state.get(wrong[0])).__name__}")
    if not all(isinstance(t, Tensor) for t in state["masks"].values()) or not 0 <= state["done"] <= total:
        raise Foreign(f"{state['done']} of {total} steps are done")
    check_masks({name: tuple(t.shape) for name, t in state["masks"].items()}, net)
    check_classes(state.get("classes"))
