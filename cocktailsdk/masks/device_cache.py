"""Masks on the model's device, in the quickest of three forms, cached from one use to the next."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from jaxtyping import Bool
from torch import Tensor

from ..graph import Coupling
from .bits import PIECE
from .mask import Mask
from .packed import Level, MasksByName, PackedMasks, number_type, zero_by_numbers

__all__ = ["DeviceMaskCache", "DeviceMasks", "UnitMasks", "mask_bytes", "zero_masked"]

_CACHE_BYTES = 1 << 30
_PLAIN_BYTES = 1 << 22  # masks that take no more as whole numbers stay unpacked: for small models speed counts
_SMALL = 1 << 12  # elements up to which one fill is quicker than the work on pieces


class UnitMasks(MasksByName):
    """What removed units mask, as rows and columns of each tensor: a few thousand flags instead of millions.

    It is for large models on the CPU.

    Args:
        coupling: The model's; along every axis of a tensor its units lie apart (:meth:`fits`).
        removed: For each unit whether it goes.
    """

    device = torch.device("cpu")

    def __init__(self, coupling: Coupling, removed: Bool[Tensor, " units"]) -> None:
        # A field has the unit number -1 where no unit is; as an index that is the last flag, which is False.
        gone = torch.cat([removed, torch.zeros(1, dtype=torch.bool)])
        fields = [(name, units) for name, of in coupling.fields.items() for units in of]
        flat = [units.flatten() for _, units in fields]
        parts = gone[torch.cat(flat)].split([len(units) for units in flat]) if flat else ()
        # By tensor name, what goes, in the shape in which it broadcasts to the tensor.
        self._gone: dict[str, list[Bool[Tensor, "..."]]] = {}
        self._names = self._gone
        for (name, units), part in zip(fields, parts, strict=True):
            if part.any():
                self._gone.setdefault(name, []).append(part.view(units.shape))

    @staticmethod
    def fits(coupling: Coupling) -> bool:
        """Whether every field of units varies along one axis."""
        fields = (units for of in coupling.fields.values() for units in of)
        return all(sum(n > 1 for n in units.shape) <= 1 for units in fields)

    def __getitem__(self, name: str) -> Bool[Tensor, "..."]:
        first, *more = self._gone[name]
        for gone in more:
            first = first | gone
        return ~first

    @property
    def nbytes(self) -> int:
        """Bytes that they take."""
        return sum(gone.nbytes for of in self._gone.values() for gone in of)

    def zero_masked(self, tensors: Mapping[str, Tensor], into: Mapping[str, Tensor] | None = None) -> None:
        """Set to zero what is masked in those of the tensors that have a mask here.

        Args:
            tensors: By name.
            into: Where the results go, tensors of the same shapes, strides and dtypes; ``None`` for in place.
        """
        with torch.inference_mode(False), torch.no_grad():
            for name, gone in self._gone.items():
                if name in tensors:
                    tensor = tensors[name].detach()
                    _zero(tensor, gone, tensor if into is None else into[name].detach())


def _zero(tensor: Tensor, gone: list[Bool[Tensor, "..."]], out: Tensor) -> None:
    if any(part.numel() == 1 for part in gone):  # one unit for the whole tensor: all of it goes
        out.zero_()
        return
    bits = number_type(tensor)
    if bits == torch.bool or tensor.numel() <= _SMALL or not (tensor.is_contiguous() and out.is_contiguous()):
        if out is not tensor:
            out.copy_(tensor)
        for part in gone:
            out.masked_fill_(part, 0)
        return
    # An element stays where AND with its row's and its column's number leaves its bits: -1 has all bits set, 0 none.
    n = len(tensor)
    rows, columns = torch.full((n, 1), -1, dtype=bits), torch.full((1, tensor.numel() // n), -1, dtype=bits)
    for part in gone:
        keep = part.to(bits).sub_(1)  # removed is 1 - 1 = 0, kept 0 - 1 = -1
        if len(part) > 1:
            rows &= keep.view(n, 1)
        else:
            columns &= keep.expand(1, *tensor.shape[1:]).reshape(1, -1)
    at_once = max(1, PIECE // columns.numel())
    pieces = (t.view(bits).view(n, -1).split(at_once) for t in (tensor, out))
    for value, result, row in zip(*pieces, rows.split(at_once), strict=True):
        torch.bitwise_and(value, columns, out=result)
        result &= row


DeviceMasks = PackedMasks | UnitMasks | Mapping[str, Tensor]
"""Masks by tensor name: packed, as removed units, or (small ones) as whole numbers as wide as the tensors' elements."""


class ModelTensors(Protocol):
    """A model's parameters and buffers by name; of a sharded one the local shard."""

    @property
    def sharded(self) -> bool:
        """Whether any is sharded."""

    def __getitem__(self, name: str) -> Tensor: ...

    def part(self, name: str, mask: Tensor) -> Tensor:
        """Of a mask that broadcasts to a whole tensor, what broadcasts to the local shard."""


class DeviceMaskCache:
    """The masks that were used last, on the model's device; the least recently used go once they exceed a gigabyte.

    Args:
        coupling: The model's.
        tensors: Its parameters and buffers.
    """

    def __init__(self, coupling: Coupling, tensors: ModelTensors) -> None:
        self._coupling, self._tensors = coupling, tensors
        self._cached: dict[str, DeviceMasks] = {}

    def of(self, name: str, mask: Mask) -> DeviceMasks:
        """A subnetwork's masks: packed, or as numbers if they are small."""
        masks = self._cached.pop(name, None)
        if masks is None or not self._fits(masks):
            with torch.inference_mode(False):
                masks = self._on_device(mask)
        self._cached[name] = masks  # popped and put in again: the dict's order is that of use
        sizes = {k: mask_bytes(v) for k, v in self._cached.items()}
        for oldest in list(sizes)[:-1]:
            if sum(sizes.values()) <= _CACHE_BYTES:
                break
            del self._cached[oldest], sizes[oldest]
        return masks

    def release(self) -> None:
        """Drop masks on the CPU, which are made again quickly."""
        self._cached = {name: masks for name, masks in self._cached.items() if not _on_cpu(masks)}

    def forget(self, name: str) -> None:
        """Drop the masks of a subnetwork whose mask has changed."""
        self._cached.pop(name, None)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cached": {}}

    def _fits(self, masks: DeviceMasks) -> bool:
        """Whether the model has neither moved nor changed its dtype since."""
        tensors = self._tensors
        if isinstance(masks, PackedMasks | UnitMasks):
            return all(tensors[n].device == masks.device for n in masks)
        return all(tensors[n].device == m.device and number_type(tensors[n]) == m.dtype for n, m in masks.items())

    def _on_device(self, mask: Mask) -> DeviceMasks:
        tensors = self._tensors
        units = None if mask.elements or mask.experts or mask.removed is None else self._units(mask.removed)
        if units is not None:
            return units
        if tensors.sharded:
            packed = PackedMasks((n, tensors.part(n, m)) for n, m in mask.tensors(self._coupling).items())
        elif self._only_elements(mask) and isinstance(mask.elements, Level | PackedMasks):
            packed = mask.elements.packed()
        else:
            packed = PackedMasks(mask.tensors(self._coupling).items())
        devices = {tensors[n].device for n in packed}
        if len(devices) != 1 or packed.elements * max(tensors[n].element_size() for n in packed) <= _PLAIN_BYTES:
            return {n: m.to(tensors[n].device, number_type(tensors[n])) for n, m in packed.items()}
        return packed.to(devices.pop())

    def _only_elements(self, mask: Mask) -> bool:
        """Whether the mask's elements alone say what is set to zero."""
        return mask.removed is None and not mask.experts and self._coupling.scales.keys().isdisjoint(mask.elements)

    def _units(self, removed: Tensor) -> UnitMasks | None:
        """Removed units by the positions that go, where that is quicker: for large models on the CPU."""
        tensors, fields = self._tensors, self._coupling.fields
        size = sum(tensors[n].nbytes for n in fields)
        if (
            self._coupling.scales
            or size <= _PLAIN_BYTES
            or tensors.sharded
            or any(tensors[n].device.type != "cpu" for n in fields)
        ):
            return None
        return UnitMasks(self._coupling, removed) if UnitMasks.fits(self._coupling) else None


def _on_cpu(masks: DeviceMasks) -> bool:
    if isinstance(masks, PackedMasks | UnitMasks):
        return masks.device.type == "cpu"
    return all(m.device.type == "cpu" for m in masks.values())


def mask_bytes(masks: DeviceMasks) -> int:
    """Bytes that masks take."""
    return masks.nbytes if isinstance(masks, PackedMasks | UnitMasks) else sum(m.nbytes for m in masks.values())


def zero_masked(masks: DeviceMasks, tensors: Mapping[str, Tensor], into: Mapping[str, Tensor] | None = None) -> None:
    """Set to zero what is masked in tensors: whatever was there, a NaN or infinity too.

    Args:
        masks: On the tensors' device.
        tensors: By name; each has a mask that broadcasts to it.
        into: Where the results go, tensors of the same shapes, strides and dtypes; ``None`` for in place.
    """
    if isinstance(masks, PackedMasks | UnitMasks):
        masks.zero_masked(tensors, into)
    elif tensors:
        # leave inference mode even where the caller is in it: tensors made there could not be changed outside later
        with torch.inference_mode(False), torch.no_grad():
            if into is not None:
                torch._foreach_copy_([into[n] for n in tensors], list(tensors.values()))
                tensors = {n: into[n] for n in tensors}
            zero_by_numbers([t.detach() for t in tensors.values()], [masks[n] for n in tensors])
