"""Reads one network of a bundle with nothing but the standard library and NumPy, as docs/bundle-format.md says.

    python examples/read_bundle.py BUNDLE                 list its networks
    python examples/read_bundle.py BUNDLE channel@0.469   read one, and say what of it is zero

It shows how much a reader in another language takes. Files that nobody has tampered with are assumed beyond the
checksums; `cocktailsdk.from_pretrained` checks the rest too.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import sys
from dataclasses import dataclass
from math import comb, prod
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]
DTYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1",
    "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1", "BOOL": "?",
}  # fmt: skip


class Tensors:
    """One safetensors file, mapped: what is read of it is compared with its checksums."""

    def __init__(self, file: Path, said: dict[str, Any]) -> None:
        self.data = np.memmap(file, np.uint8, "r")
        assert self.data.size == said["bytes"], f"{file} has another size"
        self.piece, self.sums = said["piece"], said["sha256"]
        length = int.from_bytes(self.take(0, 8).tobytes(), "little")
        self.begin = 8 + length
        self.header = json.loads(self.take(8, self.begin).tobytes())
        self.header.pop("__metadata__", None)

    def take(self, start: int, stop: int) -> Array:
        for i in range(start // self.piece, -(-stop // self.piece) if stop > start else 0):
            piece = self.data[i * self.piece : (i + 1) * self.piece]
            assert hashlib.sha256(piece).hexdigest() == self.sums[i], "a checksum does not fit"
        return self.data[start:stop]

    def __getitem__(self, name: str) -> Array:
        return self.part(name, 0, prod(self.header[name]["shape"])).reshape(self.header[name]["shape"])

    def part(self, name: str, start: int, count: int) -> Array:
        """So many elements in row-major order."""
        dtype = self.header[name]["dtype"]
        size = np.dtype(DTYPES[dtype]).itemsize
        first = self.begin + self.header[name]["data_offsets"][0] + start * size
        values = self.take(first, first + count * size).view(DTYPES[dtype])
        if dtype == "BF16":  # the upper half of a float32
            return (values.astype(np.uint32) << 16).view(np.float32)
        return values


@dataclass
class Weight:
    """How a weight's mask is cut into runs and tiles."""

    op: str
    shape: tuple[int, ...]
    out_axis: int
    in_axis: int
    groups: int


class Bundle:
    """A bundle's networks."""

    def __init__(self, folder: Path) -> None:
        raw = (folder / "bundle.json").read_bytes()
        self.meta = json.loads(raw)
        assert (raw[:13], raw[77:79]) == (b'{"checksum":"', b'",'), "bundle.json was changed"
        assert hashlib.sha256(raw[79:]).hexdigest() == self.meta["checksum"], "bundle.json was changed"
        assert self.meta["format"] == "cocktail-bundle"
        assert self.meta["format_version"] in (2, 3)  # 3 where there are private tensors
        files = self.meta["files"]
        self.weights = Tensors(folder / "weights.safetensors", files["weights.safetensors"])
        self.subnets = Tensors(folder / "subnets.safetensors", files["subnets.safetensors"])
        self.names: list[str] = [s["name"] for s in self.meta["subnets"]]
        self.tensors: list[str] = self.meta["model"]["tensors"]
        self.fields = self._fields()

    def dense(self) -> dict[str, Array]:
        """The dense network's tensors."""
        return {name: np.array(self.weights[name]) for name in self.weights.header}

    def subnet(self, name: str) -> dict[str, Array]:
        """A subnetwork's tensors: masked, with statistics of its own where it has them."""
        out = self.dense()
        if name == "dense":
            return out
        elements, removed = self.mask(name)
        out |= self.statistics(name, removed)
        out |= self.private(name, elements, removed)
        for tensor, keep in itertools.chain(elements.items(), self.kept(removed).items()):
            if tensor in out:
                out[tensor] = np.where(keep, out[tensor], 0).astype(out[tensor].dtype)
        return out

    def _fields(self) -> dict[str, list[Array]]:
        """Of every tensor that channel units touch the numbers of its units."""
        coupling = self.meta["coupling"]
        entries, at, vectors = self.subnets["units"].astype(np.int64), 0, []
        for row in coupling["units"]:
            if len(row) == 2:
                vectors.append(np.arange(row[0], row[0] + row[1]))
            else:
                vectors.append(entries[at : at + row[0]])
                at += row[0]
        return {
            self.tensors[place]: [vectors[v].reshape(shape) for shape, v in fields]
            for place, *fields in coupling["fields"]
        }

    def kept(self, removed: Array | None) -> dict[str, Array]:
        """What the removed units leave of each tensor that they touch."""
        out: dict[str, Array] = {}
        if removed is not None:
            gone = np.append(removed, False)  # the last is what -1 means: belongs to no unit
            for name, fields in self.fields.items():
                keep = np.array(True)
                for units in fields:
                    keep = keep & ~gone[units]
                if not keep.all():
                    out[name] = keep
        return out

    def mask(self, name: str) -> tuple[dict[str, Array], Array | None]:
        """What a subnetwork keeps of single weights, and which units it removes."""
        groups = self.meta["coupling"]["groups"]
        removed = None
        for e in self.meta["masks"]:
            if "units" in e and name in e["levels"]:
                removed = ~self.level(e, name, groups[-1][2] if groups else 0)
        for e in self.meta["masks"]:
            if "units" not in e and name in (e.get("levels") or [e.get("runs", e.get("zeroed"))]):
                return self.elements(e, name, removed), removed
        return {}, removed

    def level(self, e: dict[str, Any], name: str, count: int) -> Array:
        """What one of some nested masks keeps."""
        bits = next(b for b in (1, 2, 4, 8) if len(e["levels"]) < 1 << b)
        levels = unpacked(self.subnets[e["tensor"]], bits, count)
        return (levels == 0) | (levels > e["levels"].index(name) + 1)

    def elements(self, e: dict[str, Any], name: str, removed: Array | None) -> dict[str, Array]:
        names = e.get("weights") or [self.tensors[i] for i in self.meta["selection"]["eligible"]]
        whole = {n: self.weight(n) for n in names}
        if "zeroed" in e:
            return {n: np.zeros(self.weights.header[n]["shape"], bool) for n in e["weights"]}
        stays = self.kept(removed) if "left" in e else {}
        held = {n: left(w, stays.get(n)) for n, w in whole.items()}
        sizes = {n: prod(cut(w, e, np.zeros(w.shape, bool)).shape[:1]) for n, w in held.items()}
        if "runs" in e:
            n, m = e["n"], e["m"]
            numbers = sorted(sum(1 << i for i in c) for c in itertools.combinations(range(m), n))
            ranks = unpacked(self.subnets[e["tensor"]], max(1, (comb(m, n) - 1).bit_length()), sum(sizes.values()))
            cells = np.array(numbers)[ranks][:, None] >> np.arange(m) & 1 == 1
        else:
            cells = self.level(e, name, sum(sizes.values()))
        out, at = {}, 0
        for n, w in held.items():
            places = cut(w, e, np.arange(prod(w.shape)).reshape(w.shape))
            keep = np.ones(prod(w.shape), bool)  # what lies in no run or tile stays
            part = cells[at : at + sizes[n]].reshape(sizes[n], *(1,) * (places.ndim - cells.ndim), *cells.shape[1:])
            keep[places] = np.broadcast_to(part, places.shape)
            at += sizes[n]
            out[n] = spread(keep.reshape(w.shape), whole[n], stays.get(n))
        return out

    def weight(self, name: str) -> Weight:
        shape = tuple(self.weights.header[name]["shape"])
        for place, _, op, out_axis, in_axis, groups, *_ in self.meta["coupling"]["weights"]:
            if self.tensors[place] == name:
                return Weight(op, shape, out_axis, in_axis, groups)
        return Weight("", shape, 0, 0, 1)

    def statistics(self, name: str, removed: Array | None) -> dict[str, Array]:
        """A subnetwork's own statistics by buffer."""
        buffers: list[str] = []
        for e in self.meta["statistics"]:
            buffers = e.get("buffers", buffers)
            if e["subnet"] == name:
                kept = self.kept(removed) if "trimmed" in e else {}
                at, out = e["start"], {}
                for b in buffers:
                    keep = np.broadcast_to(kept.get(b, True), self.weights.header[b]["shape"])
                    values = self.subnets.part(f"statistics.{e['dtype']}", at, int(keep.sum()))
                    out[b] = np.zeros(keep.shape, values.dtype)
                    out[b][keep] = values
                    at += values.size
                return out
        return {}

    def private(self, name: str, elements: dict[str, Array], removed: Array | None) -> dict[str, Array]:
        """A subnetwork's private tensors by parameter: where the mask keeps nothing, no value is stored."""
        out: dict[str, Array] = {}
        units = self.kept(removed)
        for e in self.meta.get("private", []):
            at = e["start"]
            for tensor in (self.tensors[place] for place in e["parameters"] if e["subnet"] == name):
                shape = self.weights.header[tensor]["shape"]
                keep = np.broadcast_to(elements.get(tensor, True) & units.get(tensor, np.array(True)), shape)
                values = self.subnets.part(f"private.{e['dtype']}", at, int(keep.sum()))
                out[tensor] = np.zeros(shape, values.dtype)
                out[tensor][keep] = values
                at += values.size
        return out


def unpacked(data: Array, bits: int, count: int) -> Array:
    """Whole numbers of so many bits, one after another, the least significant bit first."""
    spread = np.unpackbits(data, bitorder="little", count=bits * count).reshape(count, bits)
    return spread.astype(np.int64) @ (1 << np.arange(bits))


def matrices(w: Weight, t: Array) -> Array:
    """Outputs by inputs: one matrix for each kernel position and convolution group."""
    t = np.moveaxis(t, (w.out_axis, w.in_axis), (-2, -1))
    if w.groups > 1:
        axis = t.ndim - (1 if w.op == "conv_transpose" else 2)
        t = t.reshape(*t.shape[:axis], w.groups, t.shape[axis] // w.groups, *t.shape[axis + 1 :])
        t = np.moveaxis(t, axis, 0)
    return t.reshape(-1, *t.shape[-2:])


def cut(w: Weight, e: dict[str, Any], t: Array) -> Array:
    """A tensor in cells: ``(cells, …)``, of one element, of a tile or of a run each."""
    if "block" in e or "square" in e:
        rows, columns = e.get("block") or (e["m"], e["m"])
        t = matrices(w, t)
        high, wide = t.shape[1] // rows, t.shape[2] // columns
        t = t[:, : high * rows, : wide * columns].reshape(t.shape[0], high, rows, wide, columns).swapaxes(2, 3)
        return t.reshape(-1, rows, columns) if "block" in e else t.reshape(-1, columns)
    if "runs" in e:
        m = e["m"]
        if w.op == "conv_transpose" and w.groups > 1 and w.in_axis == 0:
            t = t.reshape(w.groups, -1, *t.shape[1:])
            t = np.moveaxis(t, 1, -1)
        else:
            t = np.moveaxis(t, w.in_axis, -1)
        return t[..., : t.shape[-1] // m * m].reshape(-1, m)
    return t.reshape(-1)


def positions(w: Weight, keep: Array | None) -> list[Array] | None:
    """Along each axis what stays; none where what stays is no block of rows and columns."""
    if keep is None:
        return [np.arange(n) for n in w.shape]
    keep = keep.reshape((1,) * (len(w.shape) - keep.ndim) + keep.shape)
    along = [keep.any(tuple(k for k in range(keep.ndim) if k != d)) for d in range(keep.ndim)]
    block = np.array(True)
    for d, stays in enumerate(along):
        block = block & stays.reshape([-1 if k == d else 1 for k in range(keep.ndim)])
    if not np.array_equal(np.broadcast_to(block, keep.shape), keep):
        return None
    return [np.flatnonzero(np.broadcast_to(stays, (n,))) for stays, n in zip(along, w.shape, strict=True)]


def left(w: Weight, keep: Array | None) -> Weight:
    """The weight once the removed units are sliced away."""
    stay = positions(w, keep)
    if stay is None:
        return w
    shape = tuple(p.size for p in stay)
    groups = w.groups
    if groups > 1 and w.op == "conv_transpose" and groups == w.shape[0]:
        groups = shape[0]
    elif groups > 1 and w.op == "conv" and w.shape[w.in_axis] == 1:
        groups = shape[0] // (w.shape[0] // groups)
    return Weight(w.op, shape, w.out_axis, w.in_axis, groups)


def spread(part: Array, w: Weight, keep: Array | None) -> Array:
    """A mask of what is left as one of the whole weight."""
    stay = positions(w, keep)
    if stay is None:
        return part & keep
    out = np.zeros(w.shape, bool)
    out[np.ix_(*stay)] = part
    return out


def main() -> None:
    bundle = Bundle(Path(sys.argv[1]))
    for name in sys.argv[2:]:
        for tensor, values in bundle.subnet(name).items():
            print(f"{tensor:40} {values.shape!s:20} {np.count_nonzero(values == 0):9,} of {values.size:,} are zero")
    if len(sys.argv) == 2:
        print("\n".join(bundle.names))


if __name__ == "__main__":
    main()
