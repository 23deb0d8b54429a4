"""Masks of all subnetworks as a few packed tensors."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import BundleError
from ..graph import Coupling, Weight
from ..io.values import items, keyed, more, quoted, text, texts
from ..masks import Mask
from ..patterns import Pattern, Subnet
from ..patterns.remaining import Remaining
from .forms import Form
from .packing import (
    from_levels,
    from_ranks,
    level_bits,
    pack,
    run_bits,
    to_levels,
    to_ranks,
    unpack,
)

__all__ = ["read_masks", "write_masks"]

Fetch = Callable[[str], Tensor]


def write_masks(
    patterns: Sequence[Pattern], masks: Mapping[str, Mask], coupling: Coupling, eligible: tuple[Weight, ...]
) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """Masks as entries (JSON values) and packed tensors.

    For each pattern the smallest form that holds its masks: N:M runs as ranks (1 bit a pair for 1:2, 3 bits for 2:4,
    7 for 4:8), blocks as a value each, nested masks as levels (4 bits an element or block for up to 15), others bit by
    bit. Where channels go too, what is left of the weights is all that is written.
    """
    entries: list[dict[str, Any]] = []
    tensors: dict[str, Tensor] = {}

    def put(name: str, values: Any, bits: int, **entry: Any) -> None:
        tensors[name] = pack(values, bits)
        entries.append({"tensor": name, **entry})

    def put_nested(name: str, subnets: Sequence[str], kept: Sequence[Tensor], **entry: Any) -> None:
        bits = level_bits(len(kept))
        levels = to_levels(kept) if bits else None
        if bits and levels is not None:
            put(name, levels, bits, levels=list(subnets), **entry)
        else:
            for s, k in zip(subnets, kept, strict=True):
                put(f"{name}.{s}", (~k).numpy(), 1, levels=[s], **entry)

    for p in patterns:
        alike: dict[str, list[tuple[str, Tensor, dict[str, Any]]]] = {}
        for s in p.subnets():
            mask = masks[s.name]
            names = _ordered(mask.elements, eligible)
            if not any(bool(k.any()) for k in mask.elements.values()):  # whole tensors go, or nothing does
                if names or mask.removed is None:
                    entries.append({"zeroed": s.name, "weights": list(names)})
                continue
            form, left, cells = _folded(s, mask, names, coupling)
            entry = {**form.entry(), **({"left": True} if left else {}), **_named(names, eligible)}
            if form.nm is not None:
                ranks = to_ranks(cells, form.nm[0])
                assert ranks is not None  # _cells has counted them
                put(f"{s.name}.runs", ranks, run_bits(*form.nm), runs=s.name, **entry)
            else:
                alike.setdefault(s.name if left else repr((form, names)), []).append((s.name, cells, entry))
        for i, of in enumerate(alike.values()):
            put_nested(f"{p.name}.elements{i or ''}", [s for s, _, _ in of], [k for _, k, _ in of], **of[0][2])
        with_units = [(s.name, r) for s in p.subnets() if (r := masks[s.name].removed) is not None]
        if with_units:
            put_nested(f"{p.name}.units", [s for s, _ in with_units], [~r for _, r in with_units], units=True)
    return entries, tensors


def read_masks(
    entries: Any,
    fetch: Fetch,
    names: Sequence[str],
    coupling: Coupling,
    eligible: tuple[Weight, ...],
    wanted: Collection[str] | None = None,
) -> dict[str, Mask]:
    """The inverse of :func:`write_masks`.

    Args:
        entries: Its JSON values.
        fetch: The tensor of a name; asked only for what the subnetworks wanted need.
        names: The subnetworks that must all have a mask, and no others.
        coupling: The model's coupling.
        eligible: Its eligible weights.
        wanted: Those whose masks are read; by default all.

    Raises:
        BundleError: Something does not fit.
    """
    reader = _Masks(fetch, names, coupling, eligible, set(names) if wanted is None else set(wanted))
    given = [reader.entry(e) for e in items(entries, "its masks")]
    for units in (True, False):  # what is left of weights depends on the units that are gone
        for e in given:
            if ("units" in e) == units:
                reader.read(e)
    missing = [n for n in names if n not in reader.has_elements and n not in reader.has_units]
    if missing:
        raise BundleError(f"the bundle has no mask for {missing[0]!r}" + more(missing))
    return {n: Mask(reader.elements.get(n, {}), reader.removed.get(n)) for n in names if n in reader.wanted}


class _Masks:
    """Masks from their entries, one entry after another."""

    def __init__(
        self,
        fetch: Fetch,
        names: Sequence[str],
        coupling: Coupling,
        eligible: tuple[Weight, ...],
        wanted: set[str],
    ) -> None:
        self.fetch, self.names, self.wanted = fetch, frozenset(names), wanted
        self.coupling, self.eligible = coupling, eligible
        self.elements: dict[str, dict[str, Tensor]] = {}
        self.removed: dict[str, Tensor] = {}
        self.has_elements: set[str] = set()
        self.has_units: set[str] = set()

    def entry(self, value: Any) -> Mapping[str, Any]:
        """An entry that has what it needs, and speaks of subnetworks that have no such mask yet."""
        what = "an entry of its masks"
        known = type(value) is dict
        if known and "zeroed" in value:
            e = keyed(value, what, ("zeroed", "weights"))
        elif known and "units" in value:
            e = keyed(value, what, ("tensor", "levels", "units"))
        elif known and "runs" in value:
            e = keyed(value, what, ("tensor", "runs", "n", "m"), ("square", "left", "weights"))
        else:
            e = keyed(value, what, ("tensor", "levels"), ("block", "left", "weights"))
        known_yet = self.has_units if "units" in e else self.has_elements
        for name in self.subnets(e):
            if name not in self.names or name in known_yet:
                raise BundleError(f"the bundle's masks name {quoted(name)} twice, or it is no subnet of theirs")
            known_yet.add(name)
        if any(e.get(k, True) is not True for k in ("units", "left", "square")):
            raise BundleError(f"in the bundle {what} has a mark that is not true")
        if "left" in e and len(self.subnets(e)) != 1:
            raise BundleError(f"in the bundle {what} is of what several subnets leave")
        return e

    @staticmethod
    def subnets(e: Mapping[str, Any]) -> list[str]:
        """The subnetworks that an entry is of."""
        if "levels" in e:
            return texts(e["levels"], "the levels of a mask")
        return [text(e["runs"] if "runs" in e else e["zeroed"], "the subnet of a mask")]

    def read(self, e: Mapping[str, Any]) -> None:
        """Make the masks of an entry, as far as they are wanted."""
        if self.wanted.isdisjoint(self.subnets(e)):
            return
        if "units" in e:
            self.removed |= {s: ~k for s, k in self.levels(e, self.coupling.n_units).items()}
        elif "zeroed" in e:
            shapes = self.coupling.shapes
            none = torch.zeros((), dtype=torch.bool)  # expanded: a few names must not take a model's memory
            self.elements[e["zeroed"]] = {w.name: none.expand(shapes[w.name]) for w in self.of(e)}
        else:
            self.cells(e)

    def cells(self, e: Mapping[str, Any]) -> None:
        """Make masks of weights from cells."""
        form, of = Form.of(e), self.of(e)
        left = None
        if "left" in e:
            subnet = self.subnets(e)[0]
            if subnet not in self.removed:
                raise BundleError(f"the bundle masks what {subnet!r} leaves, which removes no units")
            left = Remaining(self.coupling, self.removed[subnet])
        if form != Form() and not all(w.op for w in of):
            raise BundleError("the bundle has runs or blocks of a parameter that is no weight")
        held = of if left is None else [left.weight(w) for w in of]
        sizes = [form.cells(w) for w in held]
        if form.nm is None:
            cells = self.levels(e, sum(sizes))
        else:
            packed = unpack(self.fetch(e["tensor"]), run_bits(*form.nm), sum(sizes))
            cells = {e["runs"]: from_ranks(packed, *form.nm)}
        for s, k in cells.items():
            parts = [form.unfold(w, part) for w, part in zip(held, k.split(sizes), strict=True)]
            if left is not None:
                parts = [left.spread(w, part) for w, part in zip(of, parts, strict=True)]
            self.elements[s] = {w.name: part for w, part in zip(of, parts, strict=True)}

    def levels(self, e: Mapping[str, Any], count: int) -> dict[str, Tensor]:
        """By subnetwork what is kept, of those wanted."""
        subnets = self.subnets(e)
        bits = level_bits(len(subnets))
        if bits is None or not subnets:
            raise BundleError(f"the bundle nests {len(subnets)} masks in one")
        which = [k for k, s in enumerate(subnets, 1) if s in self.wanted]
        packed = unpack(self.fetch(text(e["tensor"], "the tensor of a mask")), bits, count)
        kept = from_levels(packed, len(subnets), which)
        return {subnets[k - 1]: part for k, part in zip(which, kept, strict=True)}

    def of(self, e: Mapping[str, Any]) -> list[Weight]:
        """The weights that an entry masks."""
        if "weights" not in e:
            return list(self.eligible)
        names = texts(e["weights"], "the weights of a mask")
        odd = [n for n in names if n not in self.coupling.shapes]
        if odd:
            raise BundleError(f"the bundle masks {quoted(odd[0])}, which is no parameter of the model")
        return _weights(names, self.coupling)


def _ordered(names: Mapping[str, Any], eligible: tuple[Weight, ...]) -> tuple[str, ...]:
    first = [w.name for w in eligible if w.name in names]
    return (*first, *sorted(set(names) - set(first)))


def _named(names: tuple[str, ...], eligible: tuple[Weight, ...]) -> dict[str, Any]:
    return {} if names == tuple(w.name for w in eligible) else {"weights": list(names)}


def _weights(names: Sequence[str], coupling: Coupling) -> list[Weight]:
    """Weights by name; of a parameter that is none (a bias), what packing needs to know: its shape."""
    known = {w.name: w for w in coupling.weights}
    return [known.get(n) or Weight(n, "", "", tuple(coupling.shapes[n]), 0, 0, 1, 0) for n in names]


def _folded(subnet: Subnet, mask: Mask, names: Sequence[str], coupling: Coupling) -> tuple[Form, bool, Tensor]:
    """The smallest form that holds a mask, whether it is one of what channels leave, and its cells."""
    weights = _weights(names, coupling)
    kept = [mask.elements[n] for n in names]
    if mask.removed is not None:
        left = Remaining(coupling, mask.removed)
        sliced = [left.slice(w, k) for w, k in zip(weights, kept, strict=True)]
        if all(torch.equal(left.spread(w, part), k) for w, part, k in zip(weights, sliced, kept, strict=True)):
            form, cells = _cells(subnet, [left.weight(w) for w in weights], sliced)
            return form, True, cells
    form, cells = _cells(subnet, weights, kept)
    return form, False, cells


def _cells(subnet: Subnet, weights: Sequence[Weight], kept: Sequence[Tensor]) -> tuple[Form, Tensor]:
    try:
        form = Form.of(subnet.options)
    except (BundleError, TypeError):  # options of a user's pattern that mean something else, or runs too long
        form = Form()
    if form != Form() and all(w.op for w in weights):
        parts = [form.fold(w, k) for w, k in zip(weights, kept, strict=True)]
        cells = torch.cat(parts)
        if all(torch.equal(form.unfold(w, c), k) for w, c, k in zip(weights, parts, kept, strict=True)) and (
            form.nm is None or bool((cells.sum(-1) == form.nm[0]).all())
        ):
            return form, cells
    return Form(), torch.cat([k.reshape(-1) for k in kept])
