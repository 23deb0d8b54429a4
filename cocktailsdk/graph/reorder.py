"""Channels in another order, without changing what the model computes.

The units of a group are interchangeable: swap two of them wherever they occur, and the model computes the same. So an
order may be chosen in which nested sets of units are runs: then what a smaller set leaves of a tensor is often a part
of its memory, and need not be copied (:meth:`cocktailsdk.graph.cut.Cutter.cut` with ``share``).

Which position takes whose place follows from the units alone: where unit *a* takes the place of unit *b*, its first
occurrence along an axis takes that of *b*'s first, its second that of *b*'s second. So the blocks of a concatenated
input stay where they are, and so do q, k and v of one weight. That an order is right for a model is shown by running
it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from jaxtyping import Bool, Int64
from torch import Tensor, nn

from ..utils.modes import evaluating
from .compare import Precision, doubled, randomise, relative_error, tensors_in
from .copies import duplicate_in_double
from .coupling import Coupling, Group

__all__ = ["Order", "nested_order"]

log = logging.getLogger(__name__)


class Order:
    """An order of a model's channel units.

    Args:
        coupling: The model's.
        units: For each unit's place the unit that stands there.
    """

    def __init__(self, coupling: Coupling, units: Int64[Tensor, " units"]) -> None:
        self.coupling, self.units = coupling, units
        # Index -1 is the last entry, which maps STAYS to itself.
        places = torch.cat([units, torch.full((1,), -1)])  # ``STAYS`` indexes the last
        self._along: dict[str, dict[int, Tensor]] = {}
        known: dict[tuple[int, bytes], Tensor | None] = {}
        for name, fields in coupling.fields.items():
            for axis, labels in _axes(fields).items():
                # Many tensors of a group share one labelling; matching it once for all is what keeps this linear.
                key = len(labels), labels.numpy().tobytes()
                if key not in known:
                    known[key] = _matched(labels, places[labels])
                taken = known[key]
                if taken is None:
                    raise ValueError(f"{name!r} has no such order along axis {axis}")
                if not torch.equal(taken, torch.arange(len(taken))):
                    self._along.setdefault(name, {})[axis] = taken

    def of(self, name: str, value: Tensor) -> Tensor:
        """A parameter's or buffer's value in this order; the value itself where that changes nothing."""
        for axis, taken in self._along.get(name, {}).items():
            value = value.index_select(axis, taken.to(value.device))
        return value

    def removed(self, removed: Bool[Tensor, " units"]) -> Bool[Tensor, " units"]:
        """For each place whether the unit there is removed."""
        return removed[self.units]

    def apply(self, model: nn.Module) -> None:
        """Put a model's parameters and buffers in this order, in place."""
        with torch.no_grad():
            for name, t in _tensors(model).items():
                if name in self._along:
                    t.copy_(self.of(name, t.detach()))


def nested_order(
    model: nn.Module,
    coupling: Coupling,
    removed: Sequence[Bool[Tensor, " units"]],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> Order:
    """An order in which each group begins with the units that stay longest, shown to leave what the model computes.

    Groups that cannot be put in order stay as they are.

    Args:
        model: Not altered.
        coupling: Its coupling, with a trace.
        removed: Nested sets of units that go.
        args: Example positional inputs.
        kwargs: Example keyword inputs.
    """
    stays = torch.stack([~r.cpu() for r in removed]).sum(0) if removed else torch.zeros(coupling.n_units)
    alike = _alike(coupling)
    all_groups = list(coupling.groups)
    order, sortable = _possible(coupling, stays, alike, all_groups)
    check = _Check(model, coupling, args, kwargs)
    # One run in the usual case. Only if it fails is each group tried by itself.
    if check.same(order):
        return order
    ordered = [g for g in sortable if check.same(_possible(coupling, stays, alike, [g])[0])]
    order, _ = _possible(coupling, stays, alike, ordered)
    log.warning(
        "these channel groups keep their order, since the model computes something else in another: %s",
        ", ".join(g.name for g in coupling.groups if g not in ordered),
    )
    return order if check.same(order) else Order(coupling, torch.arange(coupling.n_units))


def _possible(
    coupling: Coupling, stays: Tensor, alike: Int64[Tensor, " units"], groups: Sequence[Group]
) -> tuple[Order, list[Group]]:
    """These groups in order, or those of them whose units can stand in each other's places, and which these are."""
    try:
        return Order(coupling, _ranked(coupling, stays, alike, groups)), list(groups)
    except ValueError as error:
        log.debug("not all groups can be put in order: %s", error)
    found: list[Group] = []
    for g in groups:
        try:
            Order(coupling, _ranked(coupling, stays, alike, [*found, g]))
            found.append(g)
        except ValueError:
            continue
    return Order(coupling, _ranked(coupling, stays, alike, found)), found


def _ranked(
    coupling: Coupling, stays: Tensor, alike: Int64[Tensor, " units"], groups: Sequence[Group]
) -> Int64[Tensor, " units"]:
    """Each of these groups' units that are alike, from those that stay longest to those that go first."""
    out = torch.arange(coupling.n_units)
    for g in groups:
        for kind in alike[g.start : g.stop].unique():
            places = g.start + (alike[g.start : g.stop] == kind).nonzero().flatten()
            out[places] = places[stays[places].argsort(descending=True, stable=True)]
    return out


def _alike(coupling: Coupling) -> Int64[Tensor, " units"]:
    """Equal numbers for units that occur equally often along every axis of every tensor."""
    counts: dict[bytes, Tensor] = {}
    for fields in coupling.fields.values():
        for units in fields:
            flat = units.flatten()
            counts.setdefault(flat.numpy().tobytes(), torch.bincount(flat[flat >= 0], minlength=coupling.n_units))
    if not counts:
        return torch.zeros(coupling.n_units, dtype=torch.int64)
    return torch.stack(list(counts.values())).unique(dim=1, return_inverse=True)[1]


def _axes(fields: Sequence[Int64[Tensor, "..."]]) -> dict[int, Int64[Tensor, "fields positions"]]:
    """By axis the units along it, of every field that varies there."""
    out: dict[int, list[Tensor]] = {}
    for units in fields:
        axes = [d for d, n in enumerate(units.shape) if n > 1]
        if len(axes) > 1:
            raise ValueError("units vary along several axes at once")
        for axis in axes:
            out.setdefault(axis, []).append(units.flatten())
    return {axis: torch.stack(found) for axis, found in out.items()}


def _matched(
    labels: Int64[Tensor, "fields positions"], wanted: Int64[Tensor, "fields positions"]
) -> Int64[Tensor, " positions"] | None:
    """For each position the one whose labels are wanted there, the n-th time the n-th; ``None`` if they differ."""
    n = labels.shape[1]
    # Columns of labels (one row for each field) become single numbers, which stable sorting matches n-th to n-th.
    kinds = torch.cat([labels, wanted], 1).unique(dim=1, return_inverse=True)[1]
    have, want = kinds[:n].sort(stable=True), kinds[n:].sort(stable=True)
    if not torch.equal(have.values, want.values):
        return None
    out = torch.empty(n, dtype=torch.int64)
    out[want.indices] = have.indices
    return out


class _Check:
    """Whether orders leave what a model computes: in float64, on randomised weights of unit scale."""

    def __init__(self, model: nn.Module, coupling: Coupling, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        generator = torch.Generator().manual_seed(0)
        self._model = duplicate_in_double(model)
        randomise(self._model, generator)
        self._inputs = doubled((tuple(args), dict(kwargs)), generator)
        self._scopes = [path for path in coupling.trace.scopes if path] if coupling.trace else []
        self._values = {n: t.detach().clone() for n, t in _tensors(self._model).items() if n in coupling.fields}
        self._wanted, self._limit = self._run()

    def same(self, order: Order) -> bool:
        """Whether the model in this order computes the same."""
        order.apply(self._model)
        try:
            got, limit = self._run()
        finally:
            with torch.no_grad():
                for n, t in _tensors(self._model).items():
                    if n in self._values:
                        t.copy_(self._values[n])
        return relative_error(got, self._wanted, self._wanted) <= max(limit, self._limit)

    def _run(self) -> tuple[list[Tensor], float]:
        """What the model returns, and the parts of it that were looked at apart; and how exactly it is known."""
        args, kwargs = self._inputs
        inside: list[Tensor] = []
        with ExitStack() as hooks:
            for path in self._scopes:
                part = self._model.get_submodule(path)
                hooks.enter_context(part.register_forward_hook(lambda _m, _a, out: inside.extend(tensors_in(out))))
            with evaluating(self._model, clear_caches=True), torch.no_grad(), Precision() as precision:
                out = tensors_in(self._model(*args, **kwargs))
        return out + inside, precision.limit


def _tensors(model: nn.Module) -> Mapping[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}
