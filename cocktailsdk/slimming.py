"""Plain models that are physically smaller."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from .errors import PatternError, SlimError
from .graph import Coupling, slim_module
from .net import CocktailNet, Example, couple_model, example_of
from .patterns.base import UMG
from .patterns.channel import checked_round_to, removed_units, unit_scores
from .selection import Modules, Selection
from .statistics import device_of, to_device

log = logging.getLogger(__name__)


def slim(
    model: nn.Module,
    example_inputs: Any = (),
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    ratio: float = 0.5,
    round_to: int | str | None = None,
    flops: float | None = None,
    params: float | None = None,
    target_modules: Modules = None,
    exclude_modules: Modules = None,
) -> nn.Module:
    """Channel pruning alone, in one line: a slim copy without the channels of least magnitude.

    The result is checked to compute what the model computes with those channels masked.

    Args:
        model: Never altered.
        example_inputs: Positional arguments of one forward pass; where none are given, an adapter is asked.
        example_kwargs: Keyword arguments of that pass.
        ratio: Share of the units removed from every prunable channel group, in [0, 1); at least one unit stays.
        round_to: The channels kept are a multiple of this; ``"auto"``: 8 in groups of 256 and more.
        flops: Instead of a ratio: the share of FLOPs that may be left, in (0, 1]; the smallest ratio that meets it is
            found.
        params: Likewise for parameters. With both, both are met.
        target_modules: Only these may lose output channels.
        exclude_modules: These keep theirs.

    Raises:
        PatternError: An argument makes no sense, nothing can be removed, or a target cannot be met.
        SlimError: The slim model cannot be made.
    """
    if isinstance(model, CocktailNet):
        raise PatternError("the model is a CocktailNet: use net.slim(name), or slim(net.model, ...)")
    if not isinstance(model, nn.Module):
        raise PatternError(f"slim takes an nn.Module, not {type(model).__name__}")
    multiple = checked_round_to(round_to)
    if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0.0 <= ratio < 1.0:
        raise PatternError(f"ratio must be a number in [0, 1), not {ratio!r}")
    for name, share in (("flops", flops), ("params", params)):
        if share is not None and (
            isinstance(share, bool) or not isinstance(share, int | float) or not 0.0 < share <= 1.0
        ):
            raise PatternError(f"{name} is the share that may be left, a number in (0, 1], not {share!r}")
    selection = Selection.of(model, target_modules, exclude_modules)
    example, goal = example_of(model, example_inputs, example_kwargs), _Goal(flops, params)
    try:
        # The slim model is proven anyway, so the coupling need not be: it is where that proof fails.
        return _slimmed(model, couple_model(model, example, selection, prove=False), example, ratio, multiple, goal)
    except SlimError as error:
        log.info("looking for what must be kept whole: %s", error)
        return _slimmed(model, couple_model(model, example, selection), example, ratio, multiple, goal)


@dataclass(frozen=True)
class _Goal:
    """What may be left, as shares of the whole; ``None`` for any."""

    flops: float | None
    params: float | None


def _slimmed(
    model: nn.Module, coupling: Coupling, example: Example, ratio: float, multiple: int | str, goal: _Goal
) -> nn.Module:
    if not coupling.groups:
        why = "; ".join(f"{k.where}: {k.reason}" for k in coupling.kept[:3])
        raise PatternError(f"no channels of {type(model).__name__} can be removed" + (f" ({why})" if why else ""))
    tensors = dict(model.named_parameters())
    values = {p.weight: tensors[p.weight].detach() for p in coupling.producers}
    scores = unit_scores(UMG(coupling, (), values), 1.0)

    def removed_at(share: float) -> Bool[Tensor, " units"]:
        return removed_units(scores, coupling, share, None, multiple)

    if goal.flops is not None or goal.params is not None:
        ratio = _smallest_ratio(coupling, removed_at, goal.flops, goal.params)
        log.info("removing %.4f of every group meets %s", ratio, goal)
    args, kwargs = to_device(example, device_of(model))
    return slim_module(model, coupling, removed_at(ratio), args, kwargs)


def _smallest_ratio(
    coupling: Coupling, removed_at: Callable[[float], Tensor], flops: float | None, params: float | None
) -> float:
    """By bisection over the ratios at which some group loses one more unit."""
    sizes = {g.size for g in coupling.groups}
    # Half a unit either side of each step: round() turns halves to even, so a step may lie on either side of it.
    steps = sorted({0.0} | {min((k + 0.5) / n + e, 1.0) for n in sizes for k in range(n) for e in (-1e-9, 0.0, 1e-9)})
    whole_flops, whole_params = coupling.flops(), coupling.params()

    def left(step: float) -> tuple[float, float]:
        removed = removed_at(step)
        return (
            coupling.flops(removed) / whole_flops if flops is not None and whole_flops else 0.0,
            coupling.params(removed) / whole_params if params is not None and whole_params else 0.0,
        )

    def meets(step: float) -> bool:
        f, p = left(step)
        return (flops is None or f <= flops) and (params is None or p <= params)

    if not meets(steps[-1]):
        f, p = left(steps[-1])
        asked = [
            f"{n}={a} (at least {h:.4f} stays)"
            for n, a, h in (("flops", flops, f), ("params", params, p))
            if a is not None
        ]
        raise PatternError(
            f"cannot be met: {', '.join(asked)}, even with one unit left in each of the {len(coupling.groups)} groups"
        )
    low, high = 0, len(steps) - 1
    while low < high:
        middle = (low + high) // 2
        if meets(steps[middle]):
            high = middle
        else:
            low = middle + 1
    return steps[low]


def slim_subnet(net: CocktailNet, name: str) -> nn.Module:
    """A plain copy of a net's subnetwork, removed channels sliced away.

    Raises:
        SlimError: It cannot be made, or the model is coupled otherwise than its bundle says.
    """
    mask = net.masks.get(name)
    removed = None if mask is None else mask.removed
    if removed is None or not bool(removed.any()):
        with net.using(name):
            return copy.deepcopy(net.model)
    if net.example is None:
        raise SlimError(
            "slimming traces the model, but the bundle could not describe its example inputs: set "
            "net.example = (args, kwargs)"
        )
    args, kwargs = to_device(net.example, device_of(net.model))
    if net.coupling.trace is None:  # read from a file: the graph is found again, and must say the same
        with net.using("dense"):
            fresh = couple_model(net.model, (args, kwargs), net.selection)
        difference = coupling_difference(net.coupling, fresh)
        if difference:
            raise SlimError(
                f"the model couples its channels otherwise than when the bundle was made: {difference}; use the "
                "versions of the model's library and of PyTorch that made it"
            )
        net.coupling = replace(net.coupling, trace=fresh.trace)
    with net.using(name):
        return slim_module(net.model, net.coupling, removed, args, kwargs)


def coupling_difference(a: Coupling, b: Coupling) -> str | None:
    """In words, the first way in which two couplings would remove different things; ``None`` where they agree."""
    if a.n_units != b.n_units:
        return f"{a.n_units} units, now {b.n_units}"
    for x, y in zip(a.groups, b.groups, strict=False):
        if (x.start, x.stop) != (y.start, y.stop):
            return f"group {x.name!r} has units {x.start} to {x.stop}, now {y.name!r} {y.start} to {y.stop}"
    if set(a.fields) != set(b.fields):
        return f"{sorted(set(a.fields) ^ set(b.fields))[0]!r} is touched by units in one of them only"
    for name, fields in a.fields.items():
        now = b.fields[name]
        if len(fields) != len(now) or not all(torch.equal(u, v) for u, v in zip(fields, now, strict=True)):
            return f"the units of {name!r} differ"
    return None
