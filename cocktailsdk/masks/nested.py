"""Nested masks together: of each element how many masks keep it, which says of every mask whether it does.

Ten masks of one element take four bits so, instead of ten. In memory the counts are *bit planes*: one packed mask for
each binary digit of the counts, so that one operation on a byte works on eight elements. In files they are *levels*:
one number an element.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from jaxtyping import Bool, Integer, UInt8
from torch import Tensor

from ..errors import BundleError
from .bits import pack_bits, unpack_bits
from .packed import PackedMasks

__all__ = ["Level", "from_levels", "level_bits", "nested_levels", "to_levels"]


def nested_levels(masks: Sequence[PackedMasks]) -> list[Level] | None:
    """The same masks as levels that share their bit planes.

    Args:
        masks: From the one that keeps most to the one that keeps least.

    Returns:
        One level a mask, or ``None`` where they are not nested, not of the same tensors, or so few that nothing is won.
    """
    if len(masks).bit_length() >= len(masks) or any(not masks[0].alike(m) for m in masks):
        return None
    planes = _count([m.bits for m in masks])
    return None if planes is None else [Level(masks[0], planes, i + 1) for i in range(len(masks))]


def _count(masks: Sequence[UInt8[Tensor, " bytes"]]) -> list[UInt8[Tensor, " bytes"]] | None:
    """For each bit in how many packed masks it is set, as bit planes, lowest digit first; ``None`` if not nested."""
    planes = [torch.zeros_like(masks[0]) for _ in range(len(masks).bit_length())]
    wider: Tensor | None = None
    for mask in masks:
        if wider is not None and bool((mask & ~wider).any()):
            return None
        wider = carry = mask
        # Add one to the counts of the elements that the mask keeps, as on paper: a digit becomes digit XOR carry, and
        # digit AND carry is carried to the next. Of the count 1 (01), a carry of 1 makes 0, carries 1, and 10 is 2.
        for plane in planes:
            both = plane & carry
            plane ^= carry
            carry = both
    return planes


class Level(Mapping[str, Bool[Tensor, "..."]]):
    """One of several nested masks, computed anew whenever it is looked at.

    Args:
        like: A mask of the same tensors.
        planes: The bit planes of the counts, the lowest digit first.
        least: The count from which on this mask keeps an element.
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
        """The bit planes, which all levels share."""
        return tuple(self._planes)

    def packed(self) -> PackedMasks:
        """This mask by itself, one bit an element."""
        return self._layout.filled(self._compared(self._planes))

    def _compared(self, planes: Sequence[UInt8[Tensor, " bytes"]]) -> UInt8[Tensor, " bytes"]:
        """Where the count is not less than ``least``, for eight elements at a time.

        Digits are compared from the highest on, while all before were equal. Where ``least`` has a 1 and the count a 0,
        the count is less; where ``least`` has a 0 and the count a 1, it is more, and no later digit changes that.
        """
        less = torch.zeros_like(planes[0])
        equal = torch.full_like(planes[0], 255)
        for i in reversed(range(len(planes))):
            if self._least >> i & 1:
                less |= equal & ~planes[i]
                equal &= planes[i]
            else:
                equal &= ~planes[i]
        return less.bitwise_not_()


def level_bits(levels: int) -> int | None:
    """Bits that a level in ``0 … levels`` takes: 4 up to 15 levels, 8 up to 255; ``None`` beyond."""
    return next((b for b in (1, 2, 4, 8) if levels < 1 << b), None)


def to_levels(masks: Sequence[Bool[Tensor, " n"]]) -> UInt8[Tensor, " n"] | None:
    """At most 255 nested masks as one level an element; ``None`` if they are not nested.

    The level 0 is of an element that all masks keep, ``k`` of one that the ``k``-th mask is the first to mask. So of
    three masks the counts 3, 2, 1, 0 are the levels 0, 3, 2, 1.
    """
    planes = _count([pack_bits(m) for m in masks])
    if planes is None:
        return None
    counts = torch.zeros(masks[0].numel(), dtype=torch.uint8)
    for i, plane in enumerate(planes):
        counts |= unpack_bits(plane)[: counts.numel()].to(torch.uint8) << i
    return (counts + 1).masked_fill_(counts == len(masks), 0)


def from_levels(
    levels: Integer[Tensor, " n"], count: int, which: Sequence[int] | None = None
) -> list[Bool[Tensor, " n"]]:
    """The inverse of :func:`to_levels`: the masks of these numbers, or of all ``1 … count``.

    Raises:
        BundleError: A level above ``count``.
    """
    if levels.numel() and int(levels.max()) > count:
        raise BundleError(f"a mask has level {int(levels.max())}, but its pattern only {count}")
    return [(levels == 0) | (levels > k) for k in which or range(1, count + 1)]
