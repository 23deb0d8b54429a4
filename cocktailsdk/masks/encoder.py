"""Masks of subnetworks as a few packed tensors and the entries (JSON values) that describe them; and back.

Bundles and run states hold masks in this form. ``docs/bundle-format.md`` has the format.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from jaxtyping import Bool
from torch import Tensor

from ..errors import BundleError
from ..graph import Coupling, Weight
from ..io.values import integer, items, keyed, more, quoted, text, texts
from .bits import from_levels, from_ranks, level_bits, pack, rank_bits, to_levels, to_ranks, unpack
from .mask import Mask
from .remaining import Remaining
from .tiles import MaskLayout, smallest_layout

__all__ = ["Entry", "decode_masks", "encode_masks"]

Entry = dict[str, Any]
"""What one packed tensor holds, as JSON values."""


class _Subnet(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def options(self) -> Mapping[str, Any]: ...


class _Pattern(Protocol):
    @property
    def name(self) -> str: ...
    def subnets(self) -> Sequence[_Subnet]: ...


class _Cells(NamedTuple):
    """The masks of a subnetwork's weights, laid out."""

    subnet: str
    layout: MaskLayout
    names: tuple[str, ...]
    sliced: bool  # whether the rows and columns of removed units are sliced away first
    values: Bool[Tensor, "cells ..."]


def encode_masks(
    patterns: Sequence[_Pattern],
    masks: Mapping[str, Mask],
    coupling: Coupling,
    eligible: tuple[Weight, ...],
    base: Mapping[str, Mask] | None = None,
) -> tuple[list[Entry], dict[str, Tensor]]:
    """Masks as entries and packed tensors.

    Each pattern's masks take the smallest layout that holds them: N:M runs as ranks (1 bit a run of 1:2, 3 of 2:4, 7 of
    4:8), blocks as a value each, nested masks as levels (4 bits an element or block for up to 15), others bit by bit.
    Where channels go too, only what is left of the weights is written.

    Args:
        patterns: The patterns that made the masks.
        masks: By subnetwork; others of the patterns are left out.
        coupling: The model's coupling.
        eligible: Its eligible weights.
        base: Masks that whoever decodes has already. A mask that is nested in the one before it, where that is here, is
            written only for the cells which that one keeps.
    """
    encoder = _Encoder(coupling, eligible, base or {})
    for pattern in patterns:
        encoder.add(pattern, masks)
    return encoder.entries, encoder.tensors


@dataclass
class _Encoder:
    """Entries and tensors, pattern by pattern."""

    coupling: Coupling
    eligible: tuple[Weight, ...]
    base: Mapping[str, Mask]
    entries: list[Entry] = field(default_factory=list)
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def add(self, pattern: _Pattern, masks: Mapping[str, Mask]) -> None:
        """Add those of the masks that are of a pattern."""
        subnets = pattern.subnets()
        levels: dict[Any, list[_Cells]] = {}  # by layout and weights: masks that may be nested
        for s in subnets:
            if s.name not in masks:
                continue
            mask = masks[s.name]
            if mask.experts:
                if mask.elements or mask.removed is not None:
                    raise BundleError(f"the mask of {s.name!r} removes experts, and other things besides")
                gone = [[n, e.nonzero().flatten().tolist()] for n, e in mask.experts.items()]
                self.entries.append({"experts": s.name, "sets": gone})
                continue
            if not any(bool(k.any()) for k in mask.elements.values()):  # whole tensors go, or nothing does
                if mask.elements or mask.removed is None:
                    self.entries.append({"zeroed": s.name, "weights": list(self._ordered(mask.elements))})
                continue
            cells = self._cells(s, mask)
            if cells.layout.nm is None:
                levels.setdefault(cells.subnet if cells.sliced else (cells.layout, cells.names), []).append(cells)
            else:
                self._put_ranks(cells, cells.layout.nm)
        for i, (first, *others) in enumerate(levels.values()):
            keeps = {c.subnet: c.values for c in (first, *others)}
            before = None if first.sliced else self._before(subnets, first.subnet)
            weights = _weights(first.names, self.coupling)
            base = None if before is None else _base_cells(self.base[before], first.layout, weights)
            self._put_nested(f"{pattern.name}.elements{i or ''}", keeps, self._described(first), before, base)
        units = {s.name: ~r.cpu() for s in subnets if s.name in masks and (r := masks[s.name].removed) is not None}
        if units:
            before = self._before(subnets, next(iter(units)))
            base = None if before is None else _base_units(self.base[before])
            self._put_nested(f"{pattern.name}.units", units, {"units": True}, before, base)

    def _put_ranks(self, cells: _Cells, nm: tuple[int, int]) -> None:
        ranks = to_ranks(cells.values, nm[0])
        assert ranks is not None  # smallest_layout() has counted them
        name = f"{cells.subnet}.runs"
        self.tensors[name] = pack(ranks, rank_bits(*nm))
        self.entries.append({"tensor": name, "runs": cells.subnet, **self._described(cells)})

    def _put_nested(
        self, name: str, keeps: Mapping[str, Tensor], entry: Entry, before: str | None, base: Tensor | None
    ) -> None:
        """Masks as levels, where they are nested, or else each by itself; within the base, where it holds them all."""
        if base is not None and not any(bool((k & ~base).any()) for k in keeps.values()):
            keeps, entry = {s: k[base] for s, k in keeps.items()}, {**entry, "within": before}
        bits = level_bits(len(keeps))
        levels = to_levels(list(keeps.values())) if bits else None
        if bits and levels is not None:
            self.tensors[name] = pack(levels, bits)
            self.entries.append({"tensor": name, "levels": list(keeps), **entry})
            return
        for s, keep in keeps.items():
            self.tensors[f"{name}.{s}"] = pack(~keep, 1)
            self.entries.append({"tensor": f"{name}.{s}", "levels": [s], **entry})

    def _before(self, subnets: Sequence[_Subnet], name: str) -> str | None:
        """The last of a pattern's subnetworks before one whose mask is in the base."""
        names = [s.name for s in subnets]
        return next((n for n in reversed(names[: names.index(name)]) if n in self.base), None)

    def _described(self, cells: _Cells) -> Entry:
        out = {**cells.layout.entry(), **({"left": True} if cells.sliced else {})}
        return out if cells.names == tuple(w.name for w in self.eligible) else {**out, "weights": list(cells.names)}

    def _ordered(self, names: Mapping[str, Any]) -> tuple[str, ...]:
        first = [w.name for w in self.eligible if w.name in names]
        return (*first, *sorted(set(names) - set(first)))

    def _cells(self, subnet: _Subnet, mask: Mask) -> _Cells:
        """The cells of a mask, of what removed units leave where that is all the mask keeps."""
        names = self._ordered(mask.elements)
        weights, keeps = _weights(names, self.coupling), [mask.elements[n].cpu() for n in names]
        if mask.removed is not None:
            remaining = Remaining(self.coupling, mask.removed)
            slices = [remaining.slice(w, k) for w, k in zip(weights, keeps, strict=True)]
            if all(torch.equal(remaining.spread(w, s), k) for w, s, k in zip(weights, slices, keeps, strict=True)):
                layout, values = smallest_layout(subnet.options, [remaining.weight(w) for w in weights], slices)
                return _Cells(subnet.name, layout, names, True, values)
        layout, values = smallest_layout(subnet.options, weights, keeps)
        return _Cells(subnet.name, layout, names, False, values)


def _base_cells(mask: Mask, layout: MaskLayout, weights: Sequence[Weight]) -> Bool[Tensor, " cells"] | None:
    """The cells that a mask keeps in the layout of those building on it; ``None`` if it lacks some of their weights."""
    if any(w.name not in mask.elements for w in weights):
        return None
    return torch.cat([layout.encode(w, mask.elements[w.name].cpu()) for w in weights])


def _base_units(mask: Mask) -> Bool[Tensor, " units"] | None:
    """The units that a mask keeps; ``None`` if it removes none."""
    return None if mask.removed is None else ~mask.removed.cpu()


def _weights(names: Sequence[str], coupling: Coupling) -> list[Weight]:
    """Weights by name; of a parameter that is none (a bias), what packing needs to know: its shape."""
    known = {w.name: w for w in coupling.weights}
    return [known.get(n) or Weight(n, "", "", tuple(coupling.shapes[n]), 0, 0, 1, 0) for n in names]


def decode_masks(
    entries: Any,
    fetch: Callable[[str], Tensor],
    names: Sequence[str],
    coupling: Coupling,
    eligible: tuple[Weight, ...],
    wanted: Collection[str] | None = None,
    base: Mapping[str, Mask] | None = None,
) -> dict[str, Mask]:
    """The inverse of :func:`encode_masks`.

    Args:
        entries: What it returned, from a file that anybody may have written.
        fetch: The tensor of a name; asked only for what the subnetworks wanted need.
        names: The subnetworks that may have a mask. Without ``base`` all of them must.
        coupling: The model's coupling.
        eligible: Its eligible weights.
        wanted: Those whose masks are read; by default all.
        base: Masks that entries may build on; ``None`` where none may.

    Raises:
        BundleError: Something does not fit.
    """
    wanted = set(names if wanted is None else wanted)
    nested_keys = () if base is None else ("within",)
    decoder = _Decoder(fetch, frozenset(names), coupling, eligible, wanted, base or {}, nested_keys)
    known = [decoder.entry(e) for e in items(entries, "its masks")]
    for units in (True, False):  # what is left of weights depends on the units that are gone
        for e in known:
            if ("units" in e) == units:
                decoder.read(e)
    found = decoder.has_elements | decoder.has_units
    missing = [n for n in names if n not in found]
    if missing and base is None:
        raise BundleError(f"the bundle has no mask for {missing[0]!r}" + more(missing))
    masked = [n for n in names if n in decoder.wanted and n in found]
    parts = (decoder.elements, decoder.removed, decoder.experts)
    return {n: Mask(parts[0].get(n, {}), parts[1].get(n), parts[2].get(n, {})) for n in masked}


@dataclass
class _Decoder:
    """Masks from their entries, one entry after another."""

    fetch: Callable[[str], Tensor]
    names: Collection[str]
    coupling: Coupling
    eligible: tuple[Weight, ...]
    wanted: set[str]
    base: Mapping[str, Mask]
    nested_keys: tuple[str, ...]
    elements: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    removed: dict[str, Tensor] = field(default_factory=dict)
    experts: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    has_elements: set[str] = field(default_factory=set)
    has_units: set[str] = field(default_factory=set)

    def entry(self, value: Any) -> Mapping[str, Any]:
        """An entry that has what it needs, of subnetworks that have no such mask yet."""
        what, known = "an entry of its masks", type(value) is dict
        if known and "zeroed" in value:
            e = keyed(value, what, ("zeroed", "weights"))
        elif known and "experts" in value:
            e = keyed(value, what, ("experts", "sets"))
        elif known and "units" in value:
            e = keyed(value, what, ("tensor", "levels", "units"), self.nested_keys)
        elif known and "runs" in value:
            e = keyed(value, what, ("tensor", "runs", "n", "m"), ("square", "left", "weights"))
        else:
            e = keyed(value, what, ("tensor", "levels"), ("block", "left", "weights", *self.nested_keys))
        seen = self.has_units if "units" in e else self.has_elements
        for name in self.subnets(e):
            if name not in self.names or name in seen:
                raise BundleError(f"masks name {quoted(name)} twice, or it is no subnet of theirs")
            seen.add(name)
        if any(e.get(k, True) is not True for k in ("units", "left", "square")):
            raise BundleError(f"{what} has a mark that is not true")
        if "left" in e and (len(self.subnets(e)) != 1 or "within" in e):
            raise BundleError(f"{what} is of what several subnets leave")
        if "within" in e and text(e["within"], "the mask that others are nested in") not in self.base:
            raise BundleError(f"{what} is nested in {quoted(e['within'])}, of which there is no mask")
        return e

    @staticmethod
    def subnets(e: Mapping[str, Any]) -> list[str]:
        """The subnetworks that an entry is of."""
        if "levels" in e:
            return texts(e["levels"], "the levels of a mask")
        kind = next(k for k in ("runs", "zeroed", "experts") if k in e)
        return [text(e[kind], "the subnet of a mask")]

    def read(self, e: Mapping[str, Any]) -> None:
        """Make the masks of an entry, as far as they are wanted."""
        if self.wanted.isdisjoint(self.subnets(e)):
            return
        if "units" in e:
            self.removed |= {s: ~k for s, k in self.levels(e, self.coupling.n_units, _base_units).items()}
        elif "experts" in e:
            self.experts[e["experts"]] = self.sets(e)
        elif "zeroed" in e:
            shapes = self.coupling.shapes
            none = torch.zeros((), dtype=torch.bool)  # expanded: a few names must not take a model's memory
            self.elements[e["zeroed"]] = {w.name: none.expand(shapes[w.name]) for w in self.of(e)}
        else:
            self.cells(e)

    def sets(self, e: Mapping[str, Any]) -> dict[str, Tensor]:
        """By set, for each expert whether it is removed."""
        counts = {s.name: s.count for s in self.coupling.experts}
        out: dict[str, Tensor] = {}
        for entry in items(e["sets"], "the sets of experts of a mask"):
            name, removed = items(entry, "a set of experts of a mask", 2)
            if text(name, "a set of experts") not in counts or name in out:
                raise BundleError(f"a mask names the experts of {quoted(name)} twice, or the model has none there")
            gone = torch.zeros(counts[name], dtype=torch.bool)
            for i in items(removed, "the experts that a mask removes"):
                gone[integer(i, "an expert", high=counts[name] - 1)] = True
            out[name] = gone
        return out

    def cells(self, e: Mapping[str, Any]) -> None:
        """Make masks of weights from cells."""
        layout, weights = MaskLayout.of(e), self.of(e)
        remaining = None
        if "left" in e:
            subnet = self.subnets(e)[0]
            if subnet not in self.removed:
                raise BundleError(f"the mask of {subnet!r} is one of what removed units leave, and it removes none")
            remaining = Remaining(self.coupling, self.removed[subnet])
        if layout != MaskLayout() and not all(w.op for w in weights):
            raise BundleError("a mask has runs or blocks of a parameter that is no weight")
        shapes = weights if remaining is None else [remaining.weight(w) for w in weights]
        sizes = [layout.cells(w) for w in shapes]
        if layout.nm is not None:
            ranks = unpack(self.tensor(e), rank_bits(*layout.nm), sum(sizes))
            cells = {e["runs"]: from_ranks(ranks, *layout.nm)}
        else:
            cells = self.levels(e, sum(sizes), lambda mask: _base_cells(mask, layout, weights))
        for s, k in cells.items():
            parts = [layout.decode(w, part) for w, part in zip(shapes, k.split(sizes), strict=True)]
            if remaining is not None:
                parts = [remaining.spread(w, part) for w, part in zip(weights, parts, strict=True)]
            self.elements[s] = {w.name: part for w, part in zip(weights, parts, strict=True)}

    def levels(self, e: Mapping[str, Any], count: int, base_of: Callable[[Mask], Tensor | None]) -> dict[str, Tensor]:
        """Which cells are kept, by subnetwork, of those wanted.

        Args:
            e: The entry.
            count: How many cells there are.
            base_of: The cells that the mask which an entry builds on keeps: only they have a level then.
        """
        base = base_of(self.base[e["within"]]) if "within" in e else None
        if "within" in e and base is None:
            raise BundleError(f"masks build on that of {e['within']!r}, which masks other things")
        subnets = self.subnets(e)
        bits = level_bits(len(subnets))
        if bits is None or not subnets:
            raise BundleError(f"{len(subnets)} masks are nested in one")
        which = [k for k, s in enumerate(subnets, 1) if s in self.wanted]
        levels = unpack(self.tensor(e), bits, count if base is None else int(base.count_nonzero()))
        keeps = from_levels(levels, len(subnets), which)
        if base is not None:
            keeps = [torch.zeros_like(base).masked_scatter_(base, k) for k in keeps]
        return {subnets[k - 1]: keep for k, keep in zip(which, keeps, strict=True)}

    def tensor(self, e: Mapping[str, Any]) -> Tensor:
        """The packed tensor of an entry."""
        return self.fetch(text(e["tensor"], "the tensor of a mask"))

    def of(self, e: Mapping[str, Any]) -> list[Weight]:
        """The weights that an entry masks."""
        if "weights" not in e:
            return list(self.eligible)
        names = texts(e["weights"], "the weights of a mask")
        odd = [n for n in names if n not in self.coupling.shapes]
        if odd:
            raise BundleError(f"{quoted(odd[0])} is masked, which is no parameter of the model")
        return _weights(names, self.coupling)
