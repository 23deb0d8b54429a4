"""A channel group in detail: what a unit is, what goes with it from every tensor, and what that saves."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import prod

import torch
from jaxtyping import Int64
from torch import Tensor, nn

from ..graph import STAYS, Coupling, Group, Node, Weight
from ..utils.grouping import grouped
from ..utils.layer_names import owner
from .findings import ChannelGroup, Slice

__all__ = ["channel_groups"]

SOFTMAX = ("softmax", "_softmax", "_safe_softmax")
PRODUCTS = ("matmul", "bmm", "mm", "baddbmm", "einsum")
SUMS = ("add", "sub")

STEPS_TO_PRODUCT = 6
"""Between a softmax and the product with the values lie at most so many calls (casts, dropout, views)."""


@dataclass(frozen=True)
class _Heads:
    """How a group is seen by attention.

    Attributes:
        heads: Heads that one unit stands for; 0 where units are channels of every head.
        dim: Channels of a head; 0 where not known.
        of: For channels of every head, the number of heads.
    """

    heads: int
    dim: int
    of: int = 0


def channel_groups(model: nn.Module, coupling: Coupling) -> tuple[ChannelGroup, ...]:
    """Every group of a coupling."""
    runs = _Runs(coupling)
    heads, streams = _attention(coupling, runs), _streams(coupling, runs)
    weights = {w.name: w for w in coupling.weights}
    weighed = _Weighed(coupling, runs)
    out = []
    for i, g in enumerate(coupling.groups):
        touched = dict.fromkeys((t.tensor, t.axes, t.kind) for t in g.touches)
        slices = tuple(_slice(model, coupling, g, *at) for at in touched)
        params, flops = weighed.first_unit(i)
        what, unit = _unit(g, slices, heads.get(i), i in streams, weights)
        losing = grouped((s.kind, s.tensor) for s in slices)
        out.append(
            ChannelGroup(
                name=g.name,
                units=g.size,
                channels=g.channels,
                **{kind: tuple(dict.fromkeys(losing.get(kind, ()))) for kind in ("rows", "entries", "columns")},
                kind=what,
                unit=unit,
                slices=slices,
                params=params,
                flops=flops,
            )
        )
    return tuple(out)


def _slice(model: nn.Module, coupling: Coupling, g: Group, tensor: str, axes: tuple[int, ...], kind: str) -> Slice:
    positions, of, stay = 0, 1, 0
    for units in coupling.fields[tensor]:
        if tuple(d for d, n in enumerate(units.shape) if n > 1) == axes:
            positions += int(((units >= g.start) & (units < g.stop)).sum())
            of, stay = units.numel(), int((units == STAYS).sum())
    module = type(model.get_submodule(owner(tensor))).__name__
    return Slice(tensor, module, axes, kind, round(positions / g.size), positions, of, stay)


def _unit(
    g: Group, slices: Iterable[Slice], heads: _Heads | None, stream: bool, weights: Mapping[str, Weight]
) -> tuple[str, str]:
    """A group's kind, and what one of its units is."""
    rows = [s for s in slices if s.kind == "rows"]
    if heads is not None and heads.heads:
        width = f" of {heads.dim} channels" if heads.dim else ""
        fewest = min((s.per_unit for s in rows), default=0)
        if heads.heads == 1:
            return "attention heads", f"an attention head{width}"
        if heads.dim and fewest < heads.heads * heads.dim:
            shared = max(fewest // heads.dim, 1)
            pair = "the key and value head" if shared == 1 else f"the {shared} key and value heads"
            each = f" ({heads.dim} channels each)"
            return "grouped-query units", f"{heads.heads} query heads with {pair} that they share{each}"
        return "attention heads", f"{heads.heads} attention heads{width} that go together"
    if heads is not None and heads.of > 1:
        return "head channels", f"the same channel of each of {heads.of} heads"
    stacks = {n for s in rows if (n := _stacked(weights.get(s.tensor))) > 1}
    if stacks and all(_stacked(weights.get(s.tensor)) > 1 for s in rows):
        what = "experts" if any("expert" in s.tensor.lower() for s in rows) else "stacked matrices"
        return "expert channels", f"the same channel of each of {max(stacks)} {what}"
    unit = "a channel" if g.channels == 1 else f"{g.channels} channels that go together"
    return ("residual stream", unit) if stream else ("channels", unit)


def _stacked(weight: Weight | None) -> int:
    """How many matrices a weight is a stack of."""
    if weight is None or weight.op != "matmul":
        return 1
    return prod(n for d, n in enumerate(weight.shape) if d not in (weight.out_axis, weight.in_axis))


class _Runs:
    """Which groups a unit field holds."""

    def __init__(self, coupling: Coupling) -> None:
        self._starts = torch.tensor([g.start for g in coupling.groups], dtype=torch.int64)

    def counts(self, units: Int64[Tensor, "..."]) -> dict[int, int]:
        """By group, how many positions it has."""
        prunable = units[units != STAYS]
        found, counts = torch.unique(torch.searchsorted(self._starts, prunable, right=True) - 1, return_counts=True)
        return dict(zip(found.tolist(), counts.tolist(), strict=True))


def _attention(coupling: Coupling, runs: _Runs) -> dict[int, _Heads]:
    """By group, how attention sees it; groups that it does not see are left out."""
    nodes = coupling.trace.nodes if coupling.trace is not None else ()
    users = grouped((source, node) for node in nodes for source in node.inputs)
    out: dict[int, _Heads] = {}
    for node in nodes:
        fused = node.op == "scaled_dot_product_attention"
        if node.shape is None or len(node.shape) < 3 or not (fused or node.op in SOFTMAX):
            continue
        result = node if fused else _product_after(node, users)
        rank = len(node.shape)
        for units in (*node.units, *(() if fused or result is None else result.units)):
            varying = [d for d, n in enumerate(units.shape) if n > 1]
            for g, count in runs.counts(units).items() if len(varying) == 1 else ():
                size = coupling.groups[g].size
                if varying[0] == rank - 3:
                    out.setdefault(g, _Heads(count // size, result.shape[-1] if result and result.shape else 0))
                elif varying[0] == rank - 1 and units.shape[-1] == (result.shape or (0,))[-1] if result else False:
                    out.setdefault(g, _Heads(0, 0, node.shape[-3]))
    return out


def _product_after(node: Node, users: Mapping[str, list[Node]]) -> Node | None:
    """The product of attention's weights with the values."""
    for _ in range(STEPS_TO_PRODUCT):
        following = users.get(node.name, [])
        product = next((n for n in following if n.op in PRODUCTS), None)
        if product is not None or not following:
            return product
        node = following[0]
    return None


def _streams(coupling: Coupling, runs: _Runs) -> set[int]:
    """Groups whose channels are sums of what several weights make."""
    nodes = coupling.trace.nodes if coupling.trace is not None else ()
    by_name = {n.name: n for n in nodes}
    out: set[int] = set()
    for node in nodes:
        if node.op not in SUMS or not node.units:
            continue
        sides = [by_name[i] for i in node.inputs if i in by_name and by_name[i].units]
        if len(sides) < 2:
            continue
        groups_of_sides = [set().union(*(runs.counts(u) for u in side.units)) for side in sides]
        out |= {g for g in set.intersection(*groups_of_sides) if len(coupling.groups[g].producers) > 1}
    return out


class _Weighed:
    """What the first unit of each group weighs, counted on what its group touches alone."""

    def __init__(self, coupling: Coupling, runs: _Runs) -> None:
        self._coupling = coupling
        self._tensors = [{t.tensor for t in g.touches} for g in coupling.groups]
        self._products: list[list[int]] = [[] for _ in coupling.groups]
        of_weight = grouped((name, g) for g, tensors in enumerate(self._tensors) for name in tensors)
        for at, c in enumerate(coupling.contractions):
            groups = set(of_weight.get(c.weight or "", ()))
            for units in c.factors:
                groups |= runs.counts(units).keys()
            for g in groups:
                self._products[g].append(at)

    def first_unit(self, group: int) -> tuple[int, int]:
        """Parameters and FLOPs that go with it."""
        coupling, tensors = self._coupling, self._tensors[group]
        part = replace(
            coupling,
            fields={n: coupling.fields[n] for n in tensors},
            shapes={n: coupling.shapes[n] for n in tensors if n in coupling.shapes},
            contractions=tuple(coupling.contractions[at] for at in self._products[group]),
        )
        removed = torch.zeros(coupling.n_units, dtype=torch.bool)
        removed[coupling.groups[group].start] = True
        return part.params() - part.params(removed), part.flops() - part.flops(removed)
