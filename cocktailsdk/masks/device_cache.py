"""Subnetworks' masks where the model is, kept from one use to the next."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from . import Mask
from .nested import Level
from .packed import PackedMasks, number_type, zero_by_numbers
from .units import UnitMasks

if TYPE_CHECKING:
    from ..graph import Coupling

__all__ = ["Placed", "PlacedMasks", "zero_masked"]

Placed = PackedMasks | UnitMasks | Mapping[str, Tensor]
"""Masks of parameters and buffers by name: packed, by what removed units mask, or as numbers for the tensors' bits."""

_CACHE_BYTES = 1 << 30
_PLAIN_BYTES = 1 << 22  # masks that are no larger as numbers are kept so: for small models speed is what counts


class Tensors(Protocol):
    """A model's parameters and buffers, as masks need them."""

    @property
    def sharded(self) -> bool:
        """Whether FSDP2 shards any of them."""

    def __getitem__(self, name: str) -> Tensor:
        """A tensor; of a sharded one, the local shard."""

    def part(self, name: str, mask: Tensor) -> Tensor:
        """A mask that broadcasts to a tensor, narrowed to the rows of the local shard."""


class PlacedMasks:
    """Masks that were used last, on the model's device.

    Args:
        coupling: The model's.
        tensors: Its parameters and buffers.
    """

    def __init__(self, coupling: Coupling, tensors: Tensors) -> None:
        self._coupling, self._tensors = coupling, tensors
        self._held: dict[str, Placed] = {}

    def of(self, name: str, mask: Mask) -> Placed:
        """A subnetwork's masks: packed, or as numbers if they are small."""
        masks = self._held.pop(name, None)
        if masks is None or not self._at_home(masks):
            with torch.inference_mode(False):
                masks = self._place(mask)
        self._held[name] = masks  # at the end: the dict's order is that of use
        sizes = {k: placed_bytes(v) for k, v in self._held.items()}
        for oldest in list(sizes)[:-1]:
            if sum(sizes.values()) <= _CACHE_BYTES:
                break
            del self._held[oldest], sizes[oldest]
        return masks

    def release(self) -> None:
        """Drop what can be had again quickly: what lies on the CPU."""
        self._held = {name: masks for name, masks in self._held.items() if not _on_cpu(masks)}

    def forget(self, name: str) -> None:
        """Drop what is held of a subnetwork, whose mask has changed."""
        self._held.pop(name, None)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_held": {}}

    def _at_home(self, masks: Placed) -> bool:
        """Whether the model has neither moved nor changed its dtype since."""
        tensors = self._tensors
        if isinstance(masks, PackedMasks | UnitMasks):
            return all(tensors[n].device == masks.device for n in masks)
        return all(tensors[n].device == m.device and number_type(tensors[n]) == m.dtype for n, m in masks.items())

    def _place(self, mask: Mask) -> Placed:
        tensors = self._tensors
        units = None if mask.elements or mask.removed is None else self._units(mask.removed)
        if units is not None:
            return units
        if tensors.sharded:
            packed = PackedMasks((n, tensors.part(n, m)) for n, m in mask.tensors(self._coupling).items())
        elif self._as_given(mask) and isinstance(mask.elements, Level):
            packed = mask.elements.packed()
        elif self._as_given(mask) and isinstance(mask.elements, PackedMasks):
            packed = mask.elements
        else:
            packed = PackedMasks(mask.tensors(self._coupling).items())
        devices = {tensors[n].device for n in packed}
        if len(devices) != 1 or packed.elements * max(tensors[n].element_size() for n in packed) <= _PLAIN_BYTES:
            return {n: m.to(tensors[n].device, number_type(tensors[n])) for n, m in packed.items()}
        return packed.to(devices.pop())

    def _as_given(self, mask: Mask) -> bool:
        """Whether what is set to zero is what the mask's elements say, and nothing else."""
        return mask.removed is None and self._coupling.scales.keys().isdisjoint(mask.elements)

    def _units(self, removed: Tensor) -> UnitMasks | None:
        """Removed units by the positions that go, where that is of use: for what is large and on the CPU."""
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


def _on_cpu(masks: Placed) -> bool:
    if isinstance(masks, PackedMasks | UnitMasks):
        return masks.device.type == "cpu"
    return all(m.device.type == "cpu" for m in masks.values())


def placed_bytes(masks: Placed) -> int:
    """Bytes that they take."""
    return masks.nbytes if isinstance(masks, PackedMasks | UnitMasks) else sum(m.nbytes for m in masks.values())


def zero_masked(masks: Placed, tensors: Mapping[str, Tensor], into: Mapping[str, Tensor] | None = None) -> None:
    """Set to zero what is masked in tensors: whatever was there, a NaN or infinity too.

    Args:
        masks: On the tensors' device.
        tensors: By name; each has a mask that broadcasts to it.
        into: Where the results go, tensors of the same shapes, strides and dtypes; ``None`` for in place.
    """
    if isinstance(masks, PackedMasks | UnitMasks):
        masks.zero_masked(tensors, into)
    elif tensors:
        # not inference mode even where the caller is in it: tensors made there could not be changed outside later
        with torch.inference_mode(False), torch.no_grad():
            if into is not None:
                torch._foreach_copy_([into[n] for n in tensors], list(tensors.values()))
                tensors = {n: into[n] for n in tensors}
            zero_by_numbers([t.detach() for t in tensors.values()], [masks[n] for n in tensors])
