"""Masks and statistics of all subnetworks as a few packed tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import BundleError
from ..graph import Coupling, Weight
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
    entries: Sequence[Mapping[str, Any]],
    fetch: Fetch,
    names: Sequence[str],
    coupling: Coupling,
    eligible: tuple[Weight, ...],
) -> dict[str, Mask]:
    """The inverse of :func:`write_masks`.

    Args:
        entries: Its JSON values.
        fetch: The tensor of a name.
        names: The subnetworks that must all have a mask, and no others.
        coupling: The model's coupling.
        eligible: Its eligible weights.

    Raises:
        BundleError: Something does not fit.
    """
    elements: dict[str, dict[str, Tensor]] = {n: {} for n in names}
    removed: dict[str, Tensor] = {}
    whole: set[str] = set()

    def levels(e: Mapping[str, Any], count: int) -> dict[str, Tensor]:
        bits = level_bits(len(e["levels"]))
        if bits is None:
            raise BundleError(f"the bundle nests {len(e['levels'])} masks in one")
        return dict(
            zip(e["levels"], from_levels(unpack(fetch(e["tensor"]), bits, count), len(e["levels"])), strict=True)
        )

    for e in entries:
        if e.get("units"):
            removed.update({s: ~k for s, k in levels(e, coupling.n_units).items() if s in elements})
    for e in entries:
        if e.get("units"):
            continue
        if "zeroed" in e:
            elements[e["zeroed"]] = {n: torch.zeros(coupling.shapes[n], dtype=torch.bool) for n in e["weights"]}
            whole.add(e["zeroed"])
            continue
        form = Form.of(e)
        of = _weights(tuple(e["weights"]) if "weights" in e else tuple(w.name for w in eligible), coupling)
        subnets = [e["runs"]] if "runs" in e else list(e["levels"])
        left = Remaining(coupling, removed[subnets[0]]) if e.get("left") else None
        held = of if left is None else [left.weight(w) for w in of]
        sizes = [form.cells(w) for w in held]
        if form.nm is None:
            cells = levels(e, sum(sizes))
        else:
            cells = {e["runs"]: from_ranks(unpack(fetch(e["tensor"]), run_bits(*form.nm), sum(sizes)), *form.nm)}
        for s, k in cells.items():
            parts = [form.unfold(w, part) for w, part in zip(held, k.split(sizes), strict=True)]
            if left is not None:
                parts = [left.spread(w, part) for w, part in zip(of, parts, strict=True)]
            elements[s] = {w.name: part for w, part in zip(of, parts, strict=True)}
    missing = [n for n in names if not elements[n] and n not in removed and n not in whole]
    if missing or len(elements) != len(names):
        raise BundleError(f"the bundle's masks are not those of its subnets: missing {missing}")
    return {n: Mask(elements[n], removed.get(n)) for n in names}


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


def write_statistics(
    statistics: Mapping[str, Mapping[str, Tensor]], names: Sequence[str], masks: Mapping[str, Mask], coupling: Coupling
) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """Each subnetwork's statistics one after another, without the zeros of removed channels.

    Returns:
        Entries (JSON values) and one tensor for each dtype.
    """
    entries: list[dict[str, Any]] = []
    parts: dict[str, list[Tensor]] = {}
    buffers: list[str] | None = None
    for name in names:
        own = statistics.get(name)
        if own is None:
            continue
        dtypes = {str(t.dtype).removeprefix("torch.") for t in own.values()}
        if len(dtypes) > 1:
            raise BundleError(f"the statistics of {name!r} mix {', '.join(sorted(dtypes))}; give them one dtype")
        entry: dict[str, Any] = {"subnet": name}
        if list(own) != buffers:
            buffers = entry["buffers"] = list(own)
        dtype = entry["dtype"] = dtypes.pop() if dtypes else "float32"
        kept = _kept_entries(own, masks[name], coupling) if name in masks else {}
        if kept and all(not own[b].cpu()[~k].view(-1).view(torch.uint8).any() for b, k in kept.items()):
            entry["trimmed"] = True
        else:
            kept = {}
        parts.setdefault(dtype, []).extend(
            (t.cpu()[kept[b]] if b in kept else t.cpu()).reshape(-1) for b, t in own.items()
        )
        entries.append(entry)
    return entries, {f"statistics.{d}": torch.cat(p) for d, p in parts.items() if p}


def read_statistics(
    entries: Sequence[Mapping[str, Any]],
    fetch: Fetch,
    masks: Mapping[str, Mask],
    coupling: Coupling,
    shapes: Mapping[str, tuple[int, ...]],
) -> dict[str, dict[str, Tensor]]:
    """The inverse of :func:`write_statistics`; ``shapes`` are those of the model's buffers.

    Raises:
        BundleError: Something does not fit.
    """
    data: dict[str, Tensor] = {}
    at: dict[str, int] = {}
    out: dict[str, dict[str, Tensor]] = {}
    buffers: list[str] = []
    for e in entries:
        buffers = e.get("buffers", buffers)
        dtype = e["dtype"]
        if buffers and dtype not in data:
            data[dtype], at[dtype] = fetch(f"statistics.{dtype}"), 0
        own = {b: torch.zeros(shapes[b], dtype=data[dtype].dtype) for b in buffers}
        kept = _kept_entries(own, masks[e["subnet"]], coupling) if e.get("trimmed") else {}
        for b, t in own.items():
            keep = kept.get(b)
            n = t.numel() if keep is None else int(keep.sum())
            values = data[dtype][at[dtype] : at[dtype] + n]
            if values.numel() != n:
                raise BundleError(f"the statistics of {e['subnet']!r} end early, in {b!r}")
            at[dtype] += n
            if keep is None:
                t.copy_(values.reshape(t.shape))
            else:
                t[keep] = values
        out[e["subnet"]] = own
    if any(at[d] != t.numel() for d, t in data.items()):
        raise BundleError("the bundle has statistics that belong to no subnet")
    return out


def _kept_entries(own: Mapping[str, Tensor], mask: Mask, coupling: Coupling) -> dict[str, Tensor]:
    touched = coupling.masks(mask.removed) if mask.removed is not None else {}
    return {b: touched[b].expand(t.shape) for b, t in own.items() if b in touched}


__all__ = ["read_masks", "read_statistics", "write_masks", "write_statistics"]
