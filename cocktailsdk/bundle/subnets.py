"""Masks and statistics of all subnetworks as a few packed tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from ..errors import BundleError
from ..graph import Coupling, Weight
from ..masks import Mask
from ..patterns import Pattern, Subnet
from ..patterns.nm import runs, unruns
from .packing import (
    MAX_RUN,
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
    7 for 4:8), nested masks as levels (4 bits a weight for up to 15), others bit by bit.
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

    weights = {w.name: w for w in coupling.weights}
    for p in patterns:
        plain: dict[tuple[str, ...], list[str]] = {}
        for s in p.subnets():
            mask = masks[s.name]
            if mask.elements:
                names = _ordered(mask.elements, eligible)
                found = _ranks(s, mask, names, weights)
                if found is None:
                    plain.setdefault(names, []).append(s.name)
                else:
                    n, m, ranks = found
                    put(f"{s.name}.runs", ranks, run_bits(n, m), runs=s.name, n=n, m=m, **_named(names, eligible))
        for i, (names, subnets) in enumerate(plain.items()):
            flat = [torch.cat([masks[s].elements[n].reshape(-1) for n in names]) for s in subnets]
            put_nested(f"{p.name}.elements{i or ''}", subnets, flat, **_named(names, eligible))
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
    weights = {w.name: w for w in coupling.weights}
    for e in entries:
        of = tuple(e["weights"]) if "weights" in e else tuple(w.name for w in eligible)
        if "runs" in e:
            n, m = e["n"], e["m"]
            if not 0 < n < m <= MAX_RUN:
                raise BundleError(f"the bundle has a mask of {n}:{m}")
            elements[e["runs"]] = _from_ranks(fetch(e["tensor"]), n, m, [weights[name] for name in of])
            continue
        bits = level_bits(len(e["levels"]))
        if bits is None:
            raise BundleError(f"the bundle nests {len(e['levels'])} masks in one")
        if e.get("units"):
            kept = from_levels(unpack(fetch(e["tensor"]), bits, coupling.n_units), len(e["levels"]))
            removed.update({s: ~k for s, k in zip(e["levels"], kept, strict=True) if s in elements})
            continue
        sizes = [math.prod(coupling.shapes[name]) for name in of]
        kept = from_levels(unpack(fetch(e["tensor"]), bits, sum(sizes)), len(e["levels"]))
        for s, k in zip(e["levels"], kept, strict=True):
            parts = k.split(sizes)
            elements[s] = {name: t.reshape(coupling.shapes[name]) for name, t in zip(of, parts, strict=True)}
    missing = [n for n in names if not elements[n] and n not in removed]
    if missing or len(elements) != len(names):
        raise BundleError(f"the bundle's masks are not those of its subnets: missing {missing}")
    return {n: Mask(elements[n], removed.get(n)) for n in names}


def _ordered(names: Mapping[str, Any], eligible: tuple[Weight, ...]) -> tuple[str, ...]:
    first = [w.name for w in eligible if w.name in names]
    return (*first, *sorted(set(names) - set(first)))


def _named(names: tuple[str, ...], eligible: tuple[Weight, ...]) -> dict[str, Any]:
    return {} if names == tuple(w.name for w in eligible) else {"weights": list(names)}


def _ranks(
    subnet: Subnet, mask: Mask, names: tuple[str, ...], weights: Mapping[str, Weight]
) -> tuple[int, int, Any] | None:
    n, m = subnet.options.get("n"), subnet.options.get("m")
    if not isinstance(n, int) or not isinstance(m, int) or not 0 < n < m <= MAX_RUN:
        return None
    parts: list[Tensor] = []
    for name in names:
        if name not in weights:
            return None
        run = runs(weights[name], mask.elements[name], m)
        if not torch.equal(unruns(weights[name], run, True), mask.elements[name]):
            return None  # a remainder is not kept whole
        parts.append(run.reshape(-1, m))
    ranks = to_ranks(torch.cat(parts), n)
    return None if ranks is None else (n, m, ranks)


def _from_ranks(packed: Tensor, n: int, m: int, weights: Sequence[Weight]) -> dict[str, Bool[Tensor, "..."]]:
    shapes = [runs(w, torch.empty(w.shape, device="meta"), m).shape for w in weights]
    counts = [math.prod(s[:-1]) for s in shapes]
    kept = from_ranks(unpack(packed, run_bits(n, m), sum(counts)), n, m).split(counts)
    return {w.name: unruns(w, k.reshape(s), True) for w, k, s in zip(weights, kept, shapes, strict=True)}


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
