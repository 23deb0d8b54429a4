"""Statistics of all subnetworks, stacked: one tensor for each dtype."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import BundleError
from ..graph import Coupling
from ..io.tensors import DTYPES, TensorFile
from ..io.values import integer, items, keyed, quoted, text, texts
from ..masks import Mask

__all__ = ["read_statistics", "write_statistics"]


def write_statistics(
    statistics: Mapping[str, Mapping[str, Tensor]], names: Sequence[str], masks: Mapping[str, Mask], coupling: Coupling
) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """Each subnetwork's statistics one after another, without the zeros of removed channels.

    Returns:
        Entries (JSON values) and one tensor for each dtype.
    """
    entries: list[dict[str, Any]] = []
    parts: dict[str, list[Tensor]] = {}
    ends: dict[str, int] = {}
    buffers: list[str] | None = None
    for name in names:
        own = statistics.get(name)
        if own is None:
            continue
        dtypes = {str(t.dtype).removeprefix("torch.") for t in own.values()}
        if len(dtypes) > 1:
            raise BundleError(f"the statistics of {name!r} mix {', '.join(sorted(dtypes))}; give them one dtype")
        if not all(t.is_floating_point() for t in own.values()):
            raise BundleError(f"the statistics of {name!r} are of {', '.join(dtypes)}; give them a floating dtype")
        dtype = dtypes.pop() if dtypes else "float32"
        entry: dict[str, Any] = {"subnet": name, "dtype": dtype, "start": ends.get(dtype, 0)}
        if list(own) != buffers:
            buffers = entry["buffers"] = list(own)
        kept = _kept_entries(own, masks[name], coupling) if name in masks else {}
        # Trimmed entries are read back as 0.0. Bytes are compared, since -0.0 equals 0.0 and would come back as 0.0.
        if kept and all(not own[b].cpu()[~k].view(-1).view(torch.uint8).any() for b, k in kept.items()):
            entry["trimmed"] = True
        else:
            kept = {}
        values = [(t.cpu()[kept[b]] if b in kept else t.cpu()).reshape(-1) for b, t in own.items()]
        parts.setdefault(dtype, []).extend(values)
        ends[dtype] = ends.get(dtype, 0) + sum(v.numel() for v in values)
        entries.append(entry)
    return entries, {f"statistics.{d}": torch.cat(p) for d, p in parts.items() if p}


def read_statistics(
    entries: Any,
    file: TensorFile,
    masks: Mapping[str, Mask],
    coupling: Coupling,
    shapes: Mapping[str, tuple[int, ...]],
    names: Collection[str],
    places: bool = True,
) -> dict[str, dict[str, Tensor]]:
    """The inverse of :func:`write_statistics`.

    Args:
        entries: Its JSON values.
        file: Its tensors; only the parts of the subnetworks that have a mask are read.
        masks: The masks that were read. Without those of all ``names`` it cannot be told whether the parts fill the
            tensors.
        coupling: The model's coupling.
        shapes: Shapes of the model's buffers.
        names: All subnetworks but the dense one.
        places: Whether each entry says where its values begin.

    Raises:
        BundleError: Something does not fit.
    """
    out: dict[str, dict[str, Tensor]] = {}
    at: dict[str, int] = {}
    buffers: list[str] = []
    seen: set[str] = set()
    for entry in items(entries, "its statistics"):
        what = "an entry of its statistics"
        e = keyed(entry, what, ("subnet", "dtype", "start") if places else ("subnet", "dtype"), ("buffers", "trimmed"))
        subnet, dtype = text(e["subnet"], what), text(e["dtype"], what)
        if "buffers" in e:
            buffers = texts(e["buffers"], "the buffers that have statistics")
        odd = [b for b in buffers if b not in shapes]
        if subnet not in names or subnet in seen or odd:
            raise BundleError(f"the bundle has statistics of {quoted(subnet)} for {quoted(buffers)} that fit nothing")
        seen.add(subnet)
        if e.get("trimmed", True) is not True:
            raise BundleError(f"in the bundle {what} has a mark that is not true")
        start = integer(e.get("start", at.get(dtype, 0)), "where statistics begin")
        if len(masks) == len(names) and start != at.get(dtype, 0):
            raise BundleError(f"the statistics of {subnet!r} do not begin where those before it end")
        if subnet not in masks:
            continue
        own = {b: torch.zeros(shapes[b], dtype=_dtype(dtype)) for b in buffers}
        kept = _kept_entries(own, masks[subnet], coupling) if "trimmed" in e else {}
        counts = [int(kept[b].sum()) if b in kept else t.numel() for b, t in own.items()]
        if own:
            name = f"statistics.{dtype}"
            if file.dtype(name) != _dtype(dtype):
                raise BundleError(f"the bundle's statistics of {dtype} are of {file.dtype(name)}")
            for (b, t), values in zip(own.items(), file.part(name, start, sum(counts)).split(counts), strict=True):
                if b in kept:
                    t[kept[b]] = values
                else:
                    t.copy_(values.reshape(t.shape))
            at[dtype] = start + sum(counts)
        out[subnet] = own
    if len(masks) == len(names) and any(end != file.numel(f"statistics.{d}") for d, end in at.items()):
        raise BundleError("the bundle has statistics that belong to no subnet")
    return out


def _dtype(name: str) -> torch.dtype:
    dtype = next((d for d in DTYPES.values() if str(d) == f"torch.{name}"), None)
    if dtype is None or not dtype.is_floating_point:
        raise BundleError(f"the bundle has statistics of {quoted(name)}")
    return dtype


def _kept_entries(own: Mapping[str, Tensor], mask: Mask, coupling: Coupling) -> dict[str, Tensor]:
    touched = coupling.masks(mask.removed) if mask.removed is not None else {}
    return {b: touched[b].expand(t.shape) for b, t in own.items() if b in touched}
