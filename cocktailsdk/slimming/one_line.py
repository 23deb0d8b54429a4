"""Channel pruning alone, in one line."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from ..errors import PatternError, SlimError
from ..graph import Coupling, slim_module
from ..models import after_slim
from ..net.coverage import nothing_to_remove, warn_of_few_channels
from ..net.subnet_model import SubnetModel
from ..net.target_modules import Modules, Selection
from ..net.tracing import Example, couple_model, example_of
from ..patterns.unit_choice import Choice, checked_round_to
from ..utils.devices import device_of
from ..utils.nested import to_device
from .choice import MAGNITUDE, scores_of
from .ratios import checked_ratios, pools
from .targets import Target

__all__ = ["slim"]

log = logging.getLogger(__name__)


def slim(
    model: nn.Module,
    example_inputs: Any = (),
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    ratio: float | Mapping[str, float] = 0.5,
    round_to: int | str | None = None,
    min_width: int = 1,
    scope: str = "group",
    importance: str | Callable[..., Tensor] = MAGNITUDE,
    flops: float | None = None,
    params: float | None = None,
    target_modules: Modules = None,
    exclude_modules: Modules = None,
    backend: str = "cocktail",
) -> nn.Module:
    """Channel pruning alone, in one line: a slim copy without the channels of least magnitude.

    The result is checked to compute what the model computes with those channels masked.

    Args:
        model: Never altered.
        example_inputs: Positional arguments of one forward pass; where none are given, an adapter is asked.
        example_kwargs: Keyword arguments of that pass.
        ratio: Share of the units that goes, in [0, 1); at least one unit of each group stays. Or a mapping to such
            shares: from a group's name (as :func:`cocktailsdk.inspect` has it), a module's path, the last parts of one,
            or a regular expression that must match a whole path; ``"*"`` for all that no other key claims, which stay
            whole without it. A key that names a weight's own module claims every group that the weight makes; one that
            covers several weights (a container, an expression) claims the groups that these make alone. Of several keys
            the most specific wins: a group's name, a whole path, the last parts of one (the longer the better), a
            container (the deeper the better), an expression, ``"*"``.
        round_to: The channels kept are a multiple of this; ``"auto"``: 8 in groups of 256 and more.
        min_width: At least this many channels of each group stay (a group that has no more stays whole), rounded up to
            a multiple of ``round_to``. A unit counts the channels that it stands for: a head counts ``head_dim``, three
            times that where one weight makes q, k and v.
        scope: ``"group"``: the ratio in every group. ``"global"``: units are ranked over all groups at once, each by
            its score divided by the mean of its group's, and exactly ``round(ratio * n)`` of all n units go; where the
            minimum widths hold some back, the next in rank go instead. Ties by position. With a mapping, the groups
            that one key claims are ranked together. ``round_to`` is applied to each group afterwards.
        importance: ``"magnitude"`` (the paper's score), or a function that takes a :class:`cocktailsdk.UMG`, whose
            ``values`` are all parameters, and returns a score for each unit. It is not divided by anything.
        flops: Instead of a ratio: the share of FLOPs that may be left, in (0, 1]; the smallest ratio that meets it is
            found. A mapping's ratios are multiplied by one factor, to at most 1.
        params: Likewise for parameters. With both, both are met.
        target_modules: Only these may lose output channels.
        exclude_modules: These keep theirs.
        backend: ``"torch-pruning"``: that library chooses and removes the channels, and the result is checked in the
            same way; see :func:`cocktailsdk.slimming.torch_pruning.prune` for what the options mean then.

    Raises:
        PatternError: An argument makes no sense, nothing can be removed, or a target cannot be met.
        SlimError: The slim model cannot be made.
    """
    if isinstance(model, SubnetModel):
        raise PatternError("the model is a CocktailNet: use net.slim(name), or slim(net.model, ...)")
    if not isinstance(model, nn.Module):
        raise PatternError(f"slim takes an nn.Module, not {type(model).__name__}")
    multiple, ratios, target = checked_round_to(round_to), checked_ratios(ratio), Target(flops, params)
    if isinstance(min_width, bool) or not isinstance(min_width, int) or min_width < 1:
        raise PatternError(f"min_width is a number of channels, a whole number of at least 1, not {min_width!r}")
    if scope not in ("group", "global"):
        raise PatternError(f"scope must be 'group' or 'global', not {scope!r}")
    if importance != MAGNITUDE and not callable(importance):
        raise PatternError(f"importance must be {MAGNITUDE!r} or a function, not {importance!r}")
    if backend not in ("cocktail", "torch-pruning"):
        raise PatternError(f"backend must be 'cocktail' or 'torch-pruning', not {backend!r}")
    if any(p.is_meta for p in model.parameters()):
        raise SlimError(
            f"{type(model).__name__} is on the meta device, without values, so a slim model cannot be checked; build "
            "the model with values, or use inspect"
        )
    selection = Selection.of(model, target_modules, exclude_modules)
    example = example_of(model, example_inputs, example_kwargs)
    if backend == "torch-pruning":
        if target or min_width != 1 or multiple == "auto":
            raise PatternError(
                "flops, params, min_width and round_to='auto' are not Torch-Pruning's; leave them out, or use "
                "backend='cocktail'"
            )
        from .torch_pruning import prune

        chosen = importance if callable(importance) else None
        return after_slim(prune(model, example, ratios, int(multiple), scope, selection, chosen), example)

    def slimmed(coupling: Coupling) -> nn.Module:
        if not coupling.groups:
            raise PatternError(f"no channels of {type(model).__name__} can be removed ({nothing_to_remove(coupling)})")
        proportions = 1.0 if target and isinstance(ratios, float) else ratios
        found = pools(proportions, scope, model, coupling)
        choice = Choice(coupling, scores_of(model, coupling, importance, scope), found, multiple, min_width)
        removed = target.meet(choice) if target else choice.removed()
        made = _cut(model, coupling, removed, example)
        if target or any(ratios.values() if isinstance(ratios, dict) else [ratios]):
            warn_of_few_channels(type(model).__name__, coupling, removed)
        return made

    if isinstance(ratios, dict):  # groups are named as inspect names them: those that can be shown to be removable
        return slimmed(couple_model(model, example, selection))
    try:
        # The slim model is proven anyway, so the coupling need not be: it is where that proof fails.
        return slimmed(couple_model(model, example, selection, prove=False))
    except SlimError as error:
        log.info("looking for what must be kept whole: %s", error)
        return slimmed(couple_model(model, example, selection))


def _cut(model: nn.Module, coupling: Coupling, removed: Tensor, example: Example) -> nn.Module:
    args, kwargs = to_device(example, device_of(model))
    return after_slim(slim_module(model, coupling, removed, args, kwargs), example)
