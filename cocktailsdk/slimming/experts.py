"""Models without the experts that a subnetwork removes: stacks of experts and rows of routers are sliced."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from ..errors import SlimError, described
from ..graph import ExpertSet
from ..graph.compare import Precision, doubled, randomise, relative_error, tensors_in
from ..graph.copies import duplicate, duplicate_in_double
from ..graph.hook_weights import refresh_hook_weights
from ..net.routing import lift_routers
from ..utils.modes import evaluating

__all__ = ["without_experts"]


def without_experts(
    model: nn.Module,
    sets: Sequence[ExpertSet],
    gone: Mapping[str, Bool[Tensor, " experts"]],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> nn.Module:
    """A copy of a model without some experts, which is shown to compute what the model does.

    The two are compared in float64 on random weights of unit scale.

    Args:
        model: Its routers give no token to these experts now. It is not altered.
        sets: The model's sets of experts.
        gone: By the name of a set, for each of its experts whether it goes.
        args: Example positional inputs, for the comparison.
        kwargs: Example keyword inputs.

    Raises:
        SlimError: The copy does not run, or computes something else.
    """
    generator = torch.Generator().manual_seed(0)
    masked = duplicate_in_double(model)
    randomise(masked, generator)
    slim = _cut(masked, sets, gone)
    args, kwargs = doubled((tuple(args), dict(kwargs)), generator)
    precision = Precision()
    try:
        with evaluating(masked, clear_caches=True), evaluating(slim, clear_caches=True), torch.no_grad(), precision:
            want, got = tensors_in(masked(*args, **kwargs)), tensors_in(slim(*args, **kwargs))
    except Exception as error:  # code that counts experts otherwise raises anything
        raise SlimError(
            f"the slim {type(model).__name__} without experts cannot be compared with the masked one "
            f"({described(error)}); use the subnetwork by net.switch"
        ) from error
    worst = relative_error(got, want, want)
    if not want or not worst <= precision.limit:
        raise SlimError(
            f"the slim {type(model).__name__} without experts computes something else than the masked one (relative "
            f"error {worst:.1e} in float64); use the subnetwork by net.switch"
        )
    return _cut(model, sets, gone)


def _cut(model: nn.Module, sets: Sequence[ExpertSet], gone: Mapping[str, Bool[Tensor, " experts"]]) -> nn.Module:
    parameters = dict(model.named_parameters())
    memo: dict[int, Any] = {}  # given to the copy as already copied, so that the whole ones never are
    for s in sets:
        if s.name in gone:
            kept = (~gone[s.name]).nonzero().flatten()
            for name in s.tensors:
                whole = parameters[name]
                value = whole.detach().index_select(0, kept.to(whole.device))
                memo[id(whole)] = nn.Parameter(value, whole.requires_grad)
    made = duplicate(model, memo)
    lift_routers(made)
    refresh_hook_weights(made.modules())
    for s in sets:
        if s.name in gone:
            for module in made.get_submodule(s.name).modules():
                _recount(module, s.count, int((~gone[s.name]).sum()))
    return made


def _recount(module: nn.Module, before: int, now: int) -> None:
    """Gives a module's own counts of experts, such as ``num_experts``, their new value."""
    for name, value in vars(module).items():
        if type(value) is int and value == before and "expert" in name:
            vars(module)[name] = now
