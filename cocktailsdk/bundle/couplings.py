"""A coupling as JSON and one tensor of unit numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import BundleError
from ..graph import Branch, Contraction, Coupling, Group, Kept, Producer, Touch, Weight


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
    def read(table: Sequence[Sequence[int]], data: Tensor, n_units: int) -> list[Tensor]:
        """The vectors again.

        Raises:
            BundleError: They do not fit the tensor or name units that do not exist.
        """
        out, at = [], 0
        flat = data.to(torch.int64)
        if flat.ndim != 1 or sum(r[0] for r in table if len(r) == 1) != flat.numel():
            raise BundleError("the unit vectors of the bundle do not add up")
        if flat.numel() and (int(flat.min()) < -1 or int(flat.max()) >= n_units):
            raise BundleError(f"the bundle names a unit outside of its {n_units}")
        for r in table:
            if len(r) == 1:
                out.append(flat[at : at + r[0]])
                at += r[0]
            elif r[0] < 0 or r[1] < 0 or r[0] + r[1] > n_units:
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
    meta["units"] = vectors.table
    return meta, vectors.tensor(coupling.n_units)


def read_coupling(
    meta: Mapping[str, Any],
    data: Tensor,
    tensors: Sequence[str],
    shapes: Mapping[str, tuple[int, ...]],
    buffers: Mapping[str, tuple[int, ...]],
) -> Coupling:
    """The inverse of :func:`write_coupling`.

    Args:
        meta: Its JSON values.
        data: Its tensor.
        tensors: Names by place.
        shapes: Shapes of the model's parameters.
        buffers: Shapes of the model's buffers.

    Raises:
        BundleError: It does not fit the model.
    """
    groups = tuple(
        Group(
            name,
            start,
            stop,
            tuple(tensors[p] for p in producers),
            tuple(Touch(tensors[t], tuple(axes), _KINDS[kind]) for t, axes, kind in touches),
            channels,
        )
        for name, start, stop, channels, producers, touches in meta["groups"]
    )
    ends = [0, *(g.stop for g in groups)]
    if any(g.start != end or g.stop < g.start for g, end in zip(groups, ends, strict=False)):
        raise BundleError("the bundle's channel groups do not follow one another")
    vectors = UnitVectors.read(meta["units"], data, ends[-1])

    def owner(name: str, module: str | None) -> str:
        return name.rpartition(".")[0] if module is None else module

    def unit_fields(entries: Sequence[Any]) -> tuple[Tensor, ...]:
        return tuple(vectors[i].reshape(shape) for shape, i in entries)

    fields = {}
    for place, *entries in meta["fields"]:
        name = tensors[place]
        shape = shapes.get(name) or buffers.get(name) or ()
        fields[name] = unit_fields(entries)
        for u in fields[name]:
            if len(u.shape) > len(shape) or any(
                a not in (1, b) for a, b in zip(reversed(u.shape), reversed(shape), strict=False)
            ):
                raise BundleError(f"the bundle has unit fields of shape {tuple(u.shape)} for {name!r} of shape {shape}")
    return Coupling(
        weights=tuple(
            Weight(tensors[i], owner(tensors[i], module), op, shapes[tensors[i]], out_axis, in_axis, n, macs, role)
            for i, module, op, out_axis, in_axis, n, macs, role in meta["weights"]
        ),
        producers=tuple(Producer(tensors[i], axis, vectors[u]) for i, axis, u in meta["producers"]),
        groups=groups,
        fields=fields,
        kept=tuple(Kept(where, reason) for where, reason in meta["kept"]),
        contractions=tuple(
            Contraction(
                module if i is None else owner(tensors[i], module),
                None if i is None else tensors[i],
                macs,
                unit_fields(factors),
            )
            for module, i, macs, *factors in meta["contractions"]
        ),
        shapes=dict(shapes),
        unknown_ops=dict(meta["unknown_ops"]),
        branches=tuple(
            Branch(name, tuple(tensors[i] for i in own), tuple(tensors[i] for i in weights), tuple(modules))
            for name, own, weights, modules in meta.get("branches", ())
        ),
    )


_KINDS = {"r": "rows", "c": "columns", "e": "entries"}
