"""Nested masks in fewer bits: for each element how many of them keep it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from jaxtyping import Bool, UInt8
from torch import Tensor

from .packed import PackedMasks

__all__ = ["Level", "nested_levels"]


def nested_levels(masks: Sequence[PackedMasks]) -> list[Level] | None:
    """The same masks, held together: of ten an element takes four bits instead of ten.

    Args:
        masks: From the one that keeps most to the one that keeps least.

    Returns:
        One level a mask, or ``None`` where they are not nested, not of the same tensors, or so few that nothing is won.
    """
    bits = len(masks).bit_length()
    if bits >= len(masks) or any(not masks[0].alike(m) for m in masks):
        return None
    planes = [torch.zeros_like(masks[0].bits) for _ in range(bits)]
    wider: Tensor | None = None
    for mask in masks:
        if wider is not None and bool((mask.bits & ~wider).any()):
            return None
        wider = carry = mask.bits
        for plane in planes:  # one more, in binary
            both = plane & carry
            plane ^= carry
            carry = both
    return [Level(masks[0], planes, i + 1) for i in range(len(masks))]


class Level(Mapping[str, Bool[Tensor, "..."]]):
    """One of several nested masks, worked out anew whenever it is looked at.

    Args:
        like: A mask of the same tensors.
        planes: For each element how many masks keep it, in binary, the lowest digit first; packed as masks are.
        least: How many it must be for this mask to keep it.
    """

    def __init__(self, like: PackedMasks, planes: Sequence[UInt8[Tensor, " bytes"]], least: int) -> None:
        self._layout = like.emptied()
        self._planes, self._least = list(planes), least

    def __getitem__(self, name: str) -> Bool[Tensor, "..."]:
        place = self._layout.place(name)
        return self._layout.unpacked(name, self._compared([p[place] for p in self._planes]))

    def __iter__(self) -> Iterator[str]:
        return iter(self._layout)

    def __len__(self) -> int:
        return len(self._layout)

    def __contains__(self, name: object) -> bool:
        return name in self._layout

    @property
    def planes(self) -> tuple[UInt8[Tensor, " bytes"], ...]:
        """The digits, which all levels share."""
        return tuple(self._planes)

    def packed(self) -> PackedMasks:
        """This mask by itself, one bit an element."""
        return self._layout.filled(self._compared(self._planes))

    def _compared(self, planes: Sequence[UInt8[Tensor, " bytes"]]) -> UInt8[Tensor, " bytes"]:
        """Where the number is not less than the least, digit by digit from the highest."""
        less = torch.zeros_like(planes[0])
        equal = torch.full_like(planes[0], 255)
        for i in reversed(range(len(planes))):
            if self._least >> i & 1:
                less |= equal & ~planes[i]
                equal &= planes[i]
            else:
                equal &= ~planes[i]
        return less.bitwise_not_()
