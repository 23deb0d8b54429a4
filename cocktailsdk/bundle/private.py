"""Private tensors of all subnetworks, stacked: one tensor for each dtype, without what the masks set to zero."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from ..errors import BundleError
from ..graph import Coupling
from ..io.limits import max_private_zeros
from ..io.tensors import TensorFile
from ..io.values import distinct, integer, quoted
from ..masks import Mask
from .private_entries import PRIVATE_SIZES, listed_private

__all__ = ["read_private", "write_private"]


def write_private(
    private: Mapping[str, Mapping[str, Tensor]],
    names: Sequence[str],
    masks: Mapping[str, Mask],
    coupling: Coupling,
    table: Sequence[str],
) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """Each subnetwork's private tensors one after another.

    Args:
        private: By subnetwork and parameter name, as they are stored, on the CPU.
        names: All subnetworks but the dense one.
        masks: By subnetwork.
        coupling: The model's coupling.
        table: Names of the model's tensors.

    Returns:
        Entries (JSON values) and one tensor for each dtype.

    Raises:
        BundleError: A private tensor has a dtype that no bundle holds.
    """
    entries: list[dict[str, Any]] = []
    parts: dict[str, list[Tensor]] = {}
    ends: dict[str, int] = {}
    for name in names:
        own = private.get(name, {})
        kept = masks[name].of(coupling, own)
        by_dtype: dict[str, list[str]] = {}
        for n, t in own.items():
            by_dtype.setdefault(str(t.dtype).removeprefix("torch."), []).append(n)
        for dtype, parameters in by_dtype.items():
            if dtype not in PRIVATE_SIZES:
                raise BundleError(
                    f"the private tensor of {name!r} for {parameters[0]!r} is of {dtype}; bundles hold private tensors "
                    f"of {', '.join(PRIVATE_SIZES)}"
                )
            values = [own[n][kept[n].expand(own[n].shape)] if n in kept else own[n].reshape(-1) for n in parameters]
            count = sum(v.numel() for v in values)
            places = [table.index(n) for n in parameters]
            start = ends.get(dtype, 0)
            entries.append({"subnet": name, "dtype": dtype, "start": start, "count": count, "parameters": places})
            parts.setdefault(dtype, []).extend(values)
            ends[dtype] = start + count
    return entries, {f"private.{d}": torch.cat(p) for d, p in parts.items()}


def read_private(
    meta: Mapping[str, Any],
    file: TensorFile,
    masks: Mapping[str, Mask],
    coupling: Coupling,
    stored: Mapping[str, torch.dtype],
    names: Collection[str],
) -> dict[str, dict[str, Tensor]]:
    """The inverse of :func:`write_private`.

    Args:
        meta: What ``bundle.json`` holds.
        file: The tensors; only the parts of the subnetworks that have a mask are read.
        masks: The masks that were read.
        coupling: The model's coupling.
        stored: By parameter name, the dtype in which its values are stored.
        names: All subnetworks but the dense one.

    Returns:
        By subnetwork and parameter name, in the dtypes in which they are stored.

    Raises:
        BundleError: Something does not fit.
    """
    out: dict[str, dict[str, Tensor]] = {}
    seen: set[tuple[str, str]] = set()
    ends: dict[str, int] = {}
    masked, most = 0, max_private_zeros(coupling.params())
    for entry in listed_private(meta):
        subnet, dtype, start, count = entry["subnet"], entry["dtype"], entry["start"], entry["count"]
        parameters = _parameters(entry, meta["model"]["tensors"], stored, names)
        if (subnet, dtype) in seen:
            raise BundleError(f"the bundle has two entries for the private tensors of {subnet!r} in {dtype}")
        seen.add((subnet, dtype))
        if start != ends.get(dtype, 0):
            raise BundleError(f"the private tensors of {subnet!r} do not begin where those before them end")
        ends[dtype] = start + count
        name = f"private.{dtype}"
        if file.dtype(name) != stored[parameters[0]]:
            raise BundleError(f"the bundle's private tensors of {dtype} are of {file.dtype(name)}")
        if subnet not in masks:
            continue
        shapes = {n: coupling.shapes[n] for n in parameters}
        kept = masks[subnet].of(coupling, shapes)
        counts = [int(kept[n].expand(s).sum()) if n in kept else prod(s) for n, s in shapes.items()]
        if sum(counts) != count:
            raise BundleError(f"the bundle has {count} private values of {subnet!r}, whose mask keeps {sum(counts)}")
        masked += sum(map(prod, shapes.values())) - count
        if masked > most:
            raise BundleError(f"of the bundle's private tensors more than {most} elements are masked")
        own = out.setdefault(subnet, {})
        for (n, shape), values in zip(shapes.items(), file.part(name, start, count).split(counts), strict=True):
            own[n] = torch.zeros(shape, dtype=values.dtype)
            own[n][kept[n].expand(shape) if n in kept else ...] = values if n in kept else values.reshape(shape)
    if any(end != file.numel(f"private.{d}") for d, end in ends.items()):
        raise BundleError("the bundle has private tensors that belong to no subnet")
    return out


def _parameters(
    entry: Mapping[str, Any], table: Sequence[str], stored: Mapping[str, torch.dtype], names: Collection[str]
) -> list[str]:
    """The parameters of an entry, checked."""
    subnet, dtype = entry["subnet"], f"torch.{entry['dtype']}"
    found = [table[integer(i, "a private tensor's parameter", high=len(table) - 1)] for i in entry["parameters"]]
    distinct(found, f"the private tensors of {quoted(subnet)}")
    odd = [n for n in found if str(stored.get(n)) != dtype]
    if subnet not in names or odd or not found:
        raise BundleError(
            f"the bundle has private tensors of {quoted(subnet)} for {quoted(odd or found)} that fit nothing"
        )
    return found
