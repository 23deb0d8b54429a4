"""A coupling as JSON and one tensor of unit numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from ..errors import BundleError
from ..graph import Branch, Contraction, Coupling, ExpertSet, Group, Kept, Producer, Scale, Touch, Weight
from ..io.limits import MAX_DIMS, MAX_FIELDS, max_coupling_entries, max_unit_entries
from ..io.values import distinct, integer, items, keyed, label, quoted, text, texts
from ..printable import printable


class UnitVectors:
    """Vectors of unit numbers, each kept once: runs by start and length, others as entries of one tensor."""

    def __init__(self) -> None:
        self.table: list[list[int]] = []
        self.data: list[Tensor] = []
        self._known: dict[bytes, int] = {}

    def add(self, units: Tensor) -> int:
        """The number by which a vector (flattened) is found again."""
        flat = units.reshape(-1).to(torch.int64)
        key = flat.numpy().tobytes()
        if key not in self._known:
            self._known[key] = len(self.table)
            n = flat.numel()
            if n and torch.equal(flat, torch.arange(int(flat[0]), int(flat[0]) + n)):
                self.table.append([int(flat[0]), n])
            else:
                self.table.append([n])
                self.data.append(flat)
        return self._known[key]

    def tensor(self, n_units: int) -> Tensor:
        """All entries, in the smallest integers that hold them."""
        dtype = next(t for t in (torch.int8, torch.int16, torch.int32, torch.int64) if n_units <= torch.iinfo(t).max)
        return torch.cat([*self.data, torch.zeros(0, dtype=torch.int64)]).to(dtype)

    @staticmethod
    def read(table: Any, data: Tensor, n_units: int, most: int) -> list[Tensor]:
        """The vectors again, ``most`` entries at most.

        Raises:
            BundleError: They do not fit the tensor or name units that do not exist.
        """
        rows = [
            tuple(integer(n, "a vector of units") for n in items(r, "a vector of units"))
            for r in items(table, "its vectors of units")
        ]
        if any(len(r) not in (1, 2) for r in rows):
            raise BundleError("a vector of units in the bundle is neither a run nor a count of entries")
        if sum(r[-1] for r in rows) > most:
            raise BundleError(f"the bundle's vectors of units have {sum(r[-1] for r in rows)} entries; {most} are read")
        out, at = [], 0
        flat = data.to(torch.int64, copy=True)  # not a view of the file, which may go
        if data.is_floating_point() or flat.ndim != 1 or sum(r[0] for r in rows if len(r) == 1) != flat.numel():
            raise BundleError("the unit vectors of the bundle do not add up")
        if flat.numel() and (int(flat.min()) < -1 or int(flat.max()) >= n_units):
            raise BundleError(f"the bundle names a unit outside of its {n_units}")
        for r in rows:
            if len(r) == 1:
                out.append(flat[at : at + r[0]])
                at += r[0]
            elif r[0] + r[1] > n_units:
                raise BundleError(f"the bundle names units {r[0]} to {r[0] + r[1]} of {n_units}")
            else:
                out.append(torch.arange(r[0], r[0] + r[1]))
        return out


def write_coupling(coupling: Coupling, tensors: Sequence[str]) -> tuple[dict[str, Any], Tensor]:
    """A coupling as JSON values and a tensor; tensors are named by their place in ``tensors``."""
    at = {name: i for i, name in enumerate(tensors)}
    vectors = UnitVectors()

    def owner(name: str, module: str) -> str | None:
        return None if module == name.rpartition(".")[0] else module

    def kinds(touches: tuple[Touch, ...]) -> list[list[Any]]:
        return [[at[t.tensor], list(t.axes), t.kind[0]] for t in touches]

    meta: dict[str, Any] = {
        "weights": [
            [at[w.name], owner(w.name, w.module), w.op, w.out_axis, w.in_axis, w.groups, w.macs, w.role]
            for w in coupling.weights
        ],
        "producers": [[at[p.weight], p.axis, vectors.add(p.units)] for p in coupling.producers],
        "groups": [
            [g.name, g.start, g.stop, g.channels, [at[p] for p in g.producers], kinds(g.touches)]
            for g in coupling.groups
        ],
        "fields": [
            [at[name], *([list(u.shape), vectors.add(u)] for u in fields)] for name, fields in coupling.fields.items()
        ],
        "kept": [[k.where, k.reason] for k in coupling.kept],
        "contractions": [
            [
                c.module if c.weight is None else owner(c.weight, c.module),
                None if c.weight is None else at[c.weight],
                c.macs,
                *([list(u.shape), vectors.add(u)] for u in c.factors),
            ]
            for c in coupling.contractions
        ],
        "unknown_ops": dict(coupling.unknown_ops),
        "branches": [
            [b.name, [at[t] for t in b.tensors], [at[w] for w in b.weights], list(b.modules)] for b in coupling.branches
        ],
    }
    if coupling.scales:  # few models have any
        meta["scales"] = [[at[n], at[s.name] if s.name else None, s.axis] for n, s in coupling.scales.items()]
    if any(w.unmaskable for w in coupling.weights):
        meta["unmaskable"] = [[at[w.name], w.unmaskable] for w in coupling.weights if w.unmaskable]
    if coupling.experts:
        meta["experts"] = [[s.name, s.module, [at[t] for t in s.tensors], s.count, s.top_k] for s in coupling.experts]
    meta["units"] = vectors.table
    return meta, vectors.tensor(coupling.n_units)


def read_coupling(
    meta: Any,
    data: Tensor,
    tensors: Sequence[str],
    shapes: Mapping[str, tuple[int, ...]],
    buffers: Mapping[str, tuple[int, ...]],
) -> Coupling:
    """The inverse of :func:`write_coupling`.

    Args:
        meta: Its JSON values.
        data: Its tensor.
        tensors: Names by place: those of the parameters, then those of the buffers.
        shapes: Shapes of the model's parameters.
        buffers: Shapes of the model's buffers.

    Raises:
        BundleError: It does not fit the model.
    """
    keyed(
        meta, "its coupling", _KEYS, ("branches", "scales", "unmaskable", "experts")
    )  # older bundles have no branches
    return _Reader(tensors, {**buffers, **shapes}, shapes).coupling(meta, data)


_KEYS = ("weights", "producers", "groups", "fields", "kept", "contractions", "unknown_ops", "units")
_KINDS = {"r": "rows", "c": "columns", "e": "entries"}
_OPS = ("conv", "conv_transpose", "linear", "matmul")


class _Reader:
    """Each part of a coupling from its JSON values; what does not fit the model is refused."""

    def __init__(
        self,
        tensors: Sequence[str],
        shapes: Mapping[str, tuple[int, ...]],
        parameters: Mapping[str, tuple[int, ...]],
    ) -> None:
        self.tensors, self.shapes, self.parameters = tensors, shapes, parameters
        self.vectors: list[Tensor] = []
        self.left = max_coupling_entries(len(tensors))

    def coupling(self, meta: Mapping[str, Any], data: Tensor) -> Coupling:
        groups = tuple(self.group(g) for g in self.entries(meta["groups"], "its groups"))
        ends = [0, *(g.stop for g in groups)]
        if any(g.start != end or g.stop < g.start for g, end in zip(groups, ends, strict=False)):
            raise BundleError("the bundle's channel groups do not follow one another")
        if ends[-1] > sum(sum(s) for s in self.parameters.values()):
            raise BundleError(f"the bundle has {ends[-1]} channel units, more than the model has channels")
        distinct([g.name for g in groups], "its groups")
        most = max_unit_entries(sum(prod(s) for s in self.shapes.values()))
        self.vectors = UnitVectors.read(self.entries(meta["units"], "its vectors of units"), data, ends[-1], most)
        fields = [self.field(f) for f in self.entries(meta["fields"], "its unit fields")]
        distinct([name for name, _ in fields], "its unit fields")
        reasons = [
            items(r, "a weight that is not masked", 2)
            for r in self.entries(meta.get("unmaskable", []), "its weights that are not masked")
        ]
        why = {self.parameter(place): label(reason, "why a weight is not masked") for place, reason in reasons}
        found = (self.weight(w) for w in self.entries(meta["weights"], "its weights"))
        weights = tuple(replace(w, unmaskable=why.get(w.name, "")) for w in found)
        distinct([w.name for w in weights], "its weights")
        unknown = meta["unknown_ops"]
        if type(unknown) is not dict or len(unknown) > self.left:
            raise BundleError(f"the bundle gives {quoted(unknown)} for its unknown ops, not a short object")
        return Coupling(
            weights=weights,
            producers=tuple(self.producer(p) for p in self.entries(meta["producers"], "its producers")),
            groups=groups,
            fields=dict(fields),
            kept=tuple(self.kept(k) for k in self.entries(meta["kept"], "what it keeps")),
            contractions=tuple(self.contraction(c) for c in self.entries(meta["contractions"], "its contractions")),
            shapes=dict(self.parameters),
            unknown_ops={printable(op): integer(n, "the uses of an op") for op, n in unknown.items()},
            branches=tuple(self.branch(b) for b in self.entries(meta.get("branches", []), "its branches")),
            scales=dict(self.scale(s) for s in self.entries(meta.get("scales", []), "its scales")),
            experts=self.expert_sets(meta.get("experts", [])),
        )

    def expert_sets(self, value: Any) -> tuple[ExpertSet, ...]:
        found = tuple(self.expert_set(s) for s in self.entries(value, "its experts"))
        distinct([s.name for s in found], "its sets of experts")
        distinct([t for s in found for t in s.tensors], "the tensors of its experts")
        return found

    def expert_set(self, value: Any) -> ExpertSet:
        name, module, own, count, top_k = items(value, "a set of experts", 5)
        tensors = tuple(self.parameter(t) for t in self.entries(own, "the tensors of experts"))
        path = text(module, "the module of a router")
        if not tensors or (path and not tensors[0].startswith(f"{path}.")):
            raise BundleError(f"the bundle has a router in {quoted(path)} whose weight is not there")
        count = integer(count, "the number of experts", 1)
        for t in tensors:
            if self.parameters[t][:1] != (count,):
                raise BundleError(f"the bundle has {count} experts in {t!r} of shape {self.parameters[t]}")
        top_k = integer(top_k, "the experts of a token", 1, count)
        return ExpertSet(label(name, "a set of experts"), path, tensors, count, top_k)

    def entries(self, value: Any, what: str) -> list[Any]:
        """A list; all of them together are as long as a model of so many tensors needs at most."""
        found = items(value, what)
        self.left -= len(found)
        if self.left < 0:
            raise BundleError(
                f"the bundle's coupling has more than {max_coupling_entries(len(self.tensors))} entries for a model of "
                f"{len(self.tensors)} tensors"
            )
        return found

    def tensor(self, place: Any) -> str:
        return self.tensors[integer(place, "the place of a tensor", high=len(self.tensors) - 1)]

    def parameter(self, place: Any) -> str:
        name = self.tensor(place)
        if name not in self.parameters:
            raise BundleError(f"the bundle names {name!r} as a weight, which is a buffer")
        return name

    def owner(self, name: str, module: Any) -> str:
        return name.rpartition(".")[0] if module is None else text(module, "a module")

    def group(self, value: Any) -> Group:
        name, start, stop, channels, producers, touches = items(value, "a group", 6)
        return Group(
            label(name, "a group"),
            integer(start, "the first unit of a group"),
            integer(stop, "the last unit of a group"),
            tuple(self.parameter(p) for p in self.entries(producers, "what makes a group")),
            tuple(self.touch(t) for t in self.entries(touches, "what a group touches")),
            integer(channels, "the channels of a unit", 1),
        )

    def touch(self, value: Any) -> Touch:
        place, axes, kind = items(value, "a touch", 3)
        name = self.tensor(place)
        last = max(len(self.shapes[name]) - 1, 0)
        along = tuple(integer(a, f"an axis of {name!r}", high=last) for a in self.entries(axes, "the axes of a touch"))
        if kind not in ("r", "c", "e"):
            raise BundleError(f"the bundle gives {quoted(kind)} for how a group touches {name!r}")
        return Touch(name, along, _KINDS[kind])

    def units(self, value: Any) -> Tensor:
        shape, vector = items(value, "a unit field", 2)
        units = self.vectors[integer(vector, "a vector of units", high=len(self.vectors) - 1)]
        if len(items(shape, "the shape of a unit field")) > MAX_DIMS:
            raise BundleError(f"the bundle has a unit field of {len(shape)} dimensions; at most {MAX_DIMS} are read")
        dims = [integer(n, "the shape of a unit field") for n in shape]
        if prod(dims) != units.numel():
            raise BundleError(f"the bundle has a unit field of shape {quoted(dims)} with {units.numel()} entries")
        return units.reshape(dims)

    def field(self, value: Any) -> tuple[str, tuple[Tensor, ...]]:
        place, *entries = self.entries(value, "a unit field")
        if len(entries) > MAX_FIELDS:
            raise BundleError(
                f"the bundle has {len(entries)} unit fields for one tensor; at most {MAX_FIELDS} are read"
            )
        name = self.tensor(place)
        shape, own = self.shapes[name], tuple(self.units(e) for e in entries)
        for u in own:
            if len(u.shape) > len(shape) or any(
                a not in (1, b) for a, b in zip(reversed(u.shape), reversed(shape), strict=False)
            ):
                raise BundleError(f"the bundle has unit fields of shape {tuple(u.shape)} for {name!r} of shape {shape}")
        return name, own

    def weight(self, value: Any) -> Weight:
        place, module, op, out_axis, in_axis, groups, macs, role = items(value, "a weight", 8)
        name = self.parameter(place)
        shape = self.parameters[name]
        out_axis, in_axis = (integer(a, f"an axis of {name!r}", high=len(shape) - 1) for a in (out_axis, in_axis))
        if op not in _OPS or out_axis == in_axis:
            raise BundleError(f"the bundle has {name!r} as a {quoted(op)} from axis {in_axis} to axis {out_axis}")
        if shape[0] % integer(groups, f"the groups of {name!r}", 1):
            raise BundleError(f"the bundle has {groups} groups for {name!r} of shape {shape}")
        owner = self.owner(name, module)
        return Weight(
            name, owner, op, shape, out_axis, in_axis, groups, integer(macs, "multiply-adds"), label(role, "a role")
        )

    def producer(self, value: Any) -> Producer:
        place, axis, vector = items(value, "a producer", 3)
        name = self.parameter(place)
        shape = self.parameters[name]
        axis = integer(axis, f"an axis of {name!r}", high=len(shape) - 1)
        units = self.vectors[integer(vector, "a vector of units", high=len(self.vectors) - 1)]
        if units.numel() != shape[axis]:
            raise BundleError(f"the bundle has {units.numel()} units along axis {axis} of {name!r} of shape {shape}")
        return Producer(name, axis, units)

    def kept(self, value: Any) -> Kept:
        where, reason = items(value, "what it keeps", 2)
        return Kept(label(where, "what it keeps"), label(reason, "why it keeps something"))

    def contraction(self, value: Any) -> Contraction:
        module, place, macs, *factors = self.entries(value, "a contraction")
        name = None if place is None else self.parameter(place)
        own = text(module, "a module") if name is None else self.owner(name, module)
        return Contraction(own, name, integer(macs, "multiply-adds"), tuple(self.units(f) for f in factors))

    def scale(self, value: Any) -> tuple[str, Scale]:
        place, scale, axis = items(value, "a scale", 3)
        name = self.parameter(place)
        shape = self.parameters[name]
        if axis is not None:
            axis = integer(axis, f"an axis of {name!r}", high=len(shape) - 1)
        own = "" if scale is None else self.parameter(scale)
        wanted = 1 if axis is None else shape[axis]
        if own and prod(self.parameters[own]) != wanted:
            raise BundleError(f"the bundle scales {name!r} by {own!r}, which has not {wanted} elements")
        return name, Scale(own, axis)

    def branch(self, value: Any) -> Branch:
        name, own, weights, modules = items(value, "a branch", 4)
        return Branch(
            label(name, "a branch"),
            tuple(self.parameter(t) for t in self.entries(own, "the tensors of a branch")),
            tuple(self.parameter(w) for w in self.entries(weights, "the weights of a branch")),
            tuple(texts(modules, "the modules of a branch")),
        )
