"""Whether patterns find anything to prune in a model, and what to say where they find little."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from math import prod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import PatternError
from ..graph import Coupling, Group
from ..masks import Mask
from ..patterns import Pattern, Subnet, resolve_patterns
from ..patterns.base import UMG
from ..patterns.product import Product
from ..patterns.unit_patterns import UnitPattern
from .target_modules import Selection

if TYPE_CHECKING:
    from .subnet_model import SubnetModel

__all__ = ["LOW_COVERAGE", "check_coverage", "nothing_to_prune", "nothing_to_remove", "warn_of_few_channels"]

log = logging.getLogger(__name__)

LOW_COVERAGE = 0.1
"""A pattern that can prune a smaller share of a model's weights is logged as a warning."""

HALF_COVERED = 0.5
"""Where a pattern covers more of the eligible weights, the reasons given are about the others."""

MAX_REASONS = 3
"""Reasons in one message."""


def check_coverage(net: SubnetModel, asked: Iterable[str | Pattern], umg: UMG) -> None:
    """Refuses patterns that find nothing, and warns of those that find little and of levels that remove nothing.

    Args:
        net: With a mask for every subnetwork.
        asked: The patterns as the user gave them.
        umg: Of the net.

    Raises:
        PatternError: One of them can touch no weight and no channel.
    """
    found = {s.name: _coverage(p, s, net.masks[s.name], umg) for p in net.patterns for s in p.subnets()}
    idle: list[str | Pattern] = []
    others: list[str | Pattern] = []
    for item in asked:
        finds = any(found.get(s.name, 1.0) for p in resolve_patterns(item) for s in p.subnets())
        (others if finds else idle).append(item)
    if idle:
        names = [_name_of(item) for item in others]
        leave = f", or ask for patterns={names} alone" if names else ""
        (pattern,) = resolve_patterns(idle[0])
        raise PatternError(
            f"{_name_of(idle[0])!r} finds nothing to prune in {type(net.model).__name__}: "
            f"{_reasons(net, pattern, umg, pattern.subnets())}; name weights in target_modules=[...]{leave} "
            "(cocktailsdk.inspect lists every weight with its reason)"
        )
    for pattern in net.patterns:
        _warn(net, pattern, found, umg)


def _name_of(item: str | Pattern) -> str:
    return item if isinstance(item, str) else item.name


def _warn(net: SubnetModel, pattern: Pattern, found: Mapping[str, float], umg: UMG) -> None:
    nothing = [s for s in pattern.subnets() if s.sparsity > 0 and _removes_nothing(net.masks[s.name])]
    if nothing:
        idle = [s for s in nothing if not found[s.name]]
        log.warning(
            "%s: nothing is removed, so %s dense: %s",
            ", ".join(repr(s.name) for s in nothing),
            "this subnetwork is" if len(nothing) == 1 else "these subnetworks are",
            _reasons(net, pattern, umg, idle)
            if idle
            else "so small a share is no whole weight or channel; ask for more",
        )
    little = [s for s in pattern.subnets() if 0 < found[s.name] < LOW_COVERAGE]
    if little:
        log.warning(
            "%s can touch %.2g%% of the weights of %s: %s",
            ", ".join(repr(s.name) for s in little),
            100 * max(found[s.name] for s in little),
            type(net.model).__name__,
            _reasons(net, pattern, umg, little),
        )


def _coverage(pattern: Pattern, subnet: Subnet, mask: Mask, umg: UMG) -> float:
    """The share of the model's weights that a pattern can prune."""
    total = sum(prod(shape) for shape in umg.coupling.shapes.values() if len(shape) > 1)
    if not total:
        return 0.0
    if isinstance(pattern, UnitPattern):
        return channel_coverage(umg.coupling, pattern.groups(umg.coupling))
    if pattern.removes_units and type(pattern).coverage is Pattern.coverage:
        return channel_coverage(umg.coupling)
    covered = pattern.coverage(subnet, mask, umg)
    if isinstance(pattern, Product):
        return covered * channel_coverage(umg.coupling) if umg.eligible else 0.0
    return covered * sum(w.numel for w in umg.eligible) / total


def channel_coverage(coupling: Coupling, groups: Sequence[Group] | None = None) -> float:
    """The share of a model's parameters that would be removed with all channels that can be (of these groups alone)."""
    total = coupling.params()
    every = torch.zeros(coupling.n_units, dtype=torch.bool)
    for g in coupling.groups if groups is None else groups:
        every[g.start : g.stop] = True
    fixed = coupling.params(every)
    return 1.0 - fixed / total if total else 0.0


def _removes_nothing(mask: Mask) -> bool:
    units = mask.removed is not None and bool(mask.removed.any())
    return not units and not mask.experts and all(bool(keep.all()) for keep in mask.elements.values())


def warn_of_few_channels(model: str, coupling: Coupling, removed: Tensor) -> None:
    """Warns where no channel is removed, or few can be.

    Args:
        model: What the model is called.
        coupling: Its coupling.
        removed: The units that go.
    """
    share = channel_coverage(coupling)
    if not bool(removed.any()):
        log.warning("no channel of %s is removed: so small a share of each group is no whole channel", model)
    elif share < LOW_COVERAGE:
        log.warning("%.2g%% of the weights of %s can be removed: %s", 100 * share, model, nothing_to_remove(coupling))


def nothing_to_remove(coupling: Coupling) -> str:
    """Why no channels can be removed."""
    reasons = [(k.reason, k.where, prod(coupling.shapes.get(k.where, (1,)))) for k in coupling.kept]
    return _summarized(reasons) or "no weight makes channels that another layer reads"


def _reasons(net: SubnetModel, pattern: Pattern, umg: UMG, subnets: Sequence[Subnet]) -> str:
    """Why some subnetworks of a pattern can touch no more of the model."""
    if pattern.removes_units or (isinstance(pattern, Product) and not net.coupling.n_units):
        return nothing_to_remove(net.coupling)
    names = frozenset(w.name for w in net.eligible)
    if max(pattern.coverage(s, net.masks[s.name], umg) for s in subnets) > HALF_COVERED:
        return nothing_to_prune(net.coupling, net.selection, covered=names)
    return nothing_to_prune(net.coupling, net.selection, without_place=names)


def nothing_to_prune(
    coupling: Coupling,
    selection: Selection,
    without_place: Collection[str] = (),
    covered: Collection[str] = (),
) -> str:
    """Why elements of weights cannot be pruned.

    Args:
        coupling: The model's coupling.
        selection: What the user targeted and excluded.
        without_place: Weights that are eligible, in which the pattern has no place.
        covered: Weights that need no reason.
    """
    known = {w.name: w for w in coupling.weights}
    reasons = []
    for name, shape in coupling.shapes.items():
        if len(shape) < 2 or name in covered:
            continue
        w = known.get(name)
        if name in without_place:
            reason = "too small for the pattern"
        elif w is None:
            reason = "not multiplied with activations on the example inputs"
        else:
            reason = selection.why_not(w) or "not eligible"
        reasons.append((reason, name, prod(shape)))
    return _summarized(reasons) or "it has no weight of two dimensions"


def _summarized(reasons: Sequence[tuple[str, str, int]]) -> str:
    """Each reason with its first weight, reasons for the most elements first."""
    size: dict[str, int] = {}
    names: dict[str, list[str]] = {}
    for reason, name, n in reasons:
        size[reason] = size.get(reason, 0) + n
        names.setdefault(reason, []).append(name)
    most = sorted(size, key=lambda r: -size[r])[:MAX_REASONS]
    more = len(size) - len(most)
    parts = [names[r][0] + (f" and {len(names[r]) - 1} more" if len(names[r]) > 1 else "") + f": {r}" for r in most]
    return "; ".join(parts) + (f"; and {more} other reasons" if more > 0 else "")
