"""Masks of one bit an element, nested ones in fewer bits, and how tensors are masked with them in place."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, UInt8
from torch import Tensor

from .bits import PIECE, bit_planes, byte_table, pack_bits, packed_bytes, unpack_bits

__all__ = ["Level", "PackedMasks", "nested_levels", "number_type", "zero_by_numbers"]

_GROUP = 1 << 26  # elements unpacked at a time on an accelerator, where few large kernels are quicker than many
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def number_type(tensor: Tensor) -> torch.dtype:
    """The whole numbers as wide as a tensor's elements, by which their bits are masked; bool where there are none."""
    return _BITS.get(tensor.element_size(), torch.bool)


def zero_by_numbers(tensors: Sequence[Tensor], masks: Sequence[Tensor]) -> None:
    """Set to zero, in place, what is masked: the tensors' bits, read as whole numbers, are multiplied by 1 or 0.

    As floats NaN * 0 and infinity * 0 are NaN. The bits of NaN, as a whole number, times 0 are 0: the float 0.0.
    """
    by_width: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}  # one fused call for each width
    for tensor, mask in zip(tensors, masks, strict=True):
        numbers = number_type(tensor)
        if numbers == torch.bool:  # wider than any whole number (complex128)
            tensor.masked_fill_(mask == 0, 0)
            continue
        views, factors = by_width.setdefault(numbers, ([], []))
        views.append(tensor.view(numbers))
        factors.append(mask.to(numbers))
    for views, factors in by_width.values():
        torch._foreach_mul_(views, factors)


class MasksByName(Mapping[str, Bool[Tensor, "..."]]):
    """Masks that are computed anew whenever they are looked at. ``_names`` has their names, in order, as keys."""

    _names: Mapping[str, Any]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names


class PackedMasks(MasksByName):
    """Masks by name, an eighth of a byte an element; each begins with a byte of its own.

    Args:
        masks: Names and bool masks, one after another; all on one device.
    """

    def __init__(self, masks: Iterable[tuple[str, Bool[Tensor, "..."]]] = ()) -> None:
        self._shapes: dict[str, torch.Size] = {}
        self._names = self._shapes
        self._begin: dict[str, int] = {}
        parts, at = [], 0
        for name, mask in masks:
            packed = pack_bits(mask.detach())
            self._shapes[name], self._begin[name] = mask.shape, at
            parts.append(packed)
            at += packed.numel()
        self._packed = torch.cat(parts) if parts else torch.empty(0, dtype=torch.uint8)
        self._table = byte_table().to(self._packed.device)

    def __getitem__(self, name: str) -> Bool[Tensor, "..."]:
        return self.unpacked(name, self._packed[self.place(name)])

    @property
    def bits(self) -> UInt8[Tensor, " bytes"]:
        """All masks, packed, one after another; each begins with a byte of its own. Do not change them."""
        return self._packed

    def place(self, name: str) -> slice:
        """Which of the packed bytes are a mask's."""
        begin = self._begin[name]
        return slice(begin, begin + packed_bytes(self._shapes[name].numel(), 1))

    def unpacked(self, name: str, packed: UInt8[Tensor, " bytes"]) -> Bool[Tensor, "..."]:
        """What bytes say that take the place of a mask's."""
        shape = self._shapes[name]
        return unpack_bits(packed, self._table)[: shape.numel()].view(shape)

    def alike(self, other: PackedMasks) -> bool:
        """Whether others are of the same names and shapes, in the same order, on the same device."""
        return self.device == other.device and list(self._shapes.items()) == list(other._shapes.items())

    def packed(self) -> PackedMasks:
        """These masks themselves; see :meth:`Level.packed`."""
        return self

    def filled(self, packed: UInt8[Tensor, " bytes"]) -> PackedMasks:
        """Masks of the same names and shapes with other bits."""
        new = object.__new__(PackedMasks)
        new._names = new._shapes = self._shapes
        new._begin = self._begin
        new._packed, new._table = packed, self._table.to(packed.device)
        return new

    @property
    def nbytes(self) -> int:
        """Bytes that the packed masks take."""
        return self._packed.nbytes

    @property
    def elements(self) -> int:
        """How many bits are kept."""
        return sum(shape.numel() for shape in self._shapes.values())

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self._packed.device

    def to(self, device: torch.device) -> PackedMasks:
        """The same on another device; these themselves where they are there already."""
        if device == self.device:
            return self
        return self.filled(self._packed.to(device))

    def zero_masked(self, tensors: Mapping[str, Tensor], into: Mapping[str, Tensor] | None = None) -> None:
        """Set to zero what is masked in those of the tensors that have a mask here.

        Args:
            tensors: By name, on the masks' device, of shapes to which the masks broadcast.
            into: Where the results go, tensors of the same shapes, strides and dtypes; ``None`` for in place.
        """
        names = [n for n in self._shapes if n in tensors]
        with torch.inference_mode(False), torch.no_grad():
            if self.device.type == "cpu":
                scratch = _Scratch()
                for name in names:
                    tensor = tensors[name].detach()
                    out = tensor if into is None else into[name].detach()
                    if tensor.is_contiguous() and out.is_contiguous() and tensor.shape == self._shapes[name]:
                        scratch.mask(tensor.view(-1), self._packed[self.place(name)], out.view(-1))
                    else:
                        if out is not tensor:
                            out.copy_(tensor)
                        _zero_in_pieces(out, self[name])
                return
            if into is not None:
                torch._foreach_copy_([into[n] for n in names], [tensors[n] for n in names])
                tensors = into
            for group in self._groups(names):
                zero_by_numbers([tensors[n].detach() for n in group], self._unpacked(group))

    def _groups(self, names: list[str]) -> Iterator[list[str]]:
        group: list[str] = []
        size = 0
        for name in names:
            n = self._shapes[name].numel()
            if group and size + n > _GROUP:
                yield group
                group, size = [], 0
            group.append(name)
            size += n
        if group:
            yield group

    def _unpacked(self, names: list[str]) -> list[Tensor]:
        """Masks that lie one after another, unpacked together."""
        begin, end = self._begin[names[0]], self.place(names[-1]).stop
        bits = unpack_bits(self._packed[begin:end], self._table)
        at = [8 * (self._begin[n] - begin) for n in names]
        return [bits[a : a + self._shapes[n].numel()].view(self._shapes[n]) for a, n in zip(at, names, strict=True)]


def nested_levels(masks: Sequence[PackedMasks]) -> list[Level] | None:
    """The same masks as levels that share their bit planes.

    Args:
        masks: From the one that keeps most to the one that keeps least.

    Returns:
        One level a mask, or ``None`` where they are not nested, not of the same tensors, or so few that nothing is won.
    """
    # n masks take n bits an element; their counts 0 … n take n.bit_length() bits
    if len(masks).bit_length() >= len(masks) or any(not masks[0].alike(m) for m in masks):
        return None
    planes = bit_planes([m.bits for m in masks])
    return None if planes is None else [Level(masks[0], planes, i + 1) for i in range(len(masks))]


class Level(MasksByName):
    """One of several nested masks.

    Args:
        like: A mask of the same tensors.
        planes: The bit planes of the counts, the lowest digit first.
        least: The count from which on this mask keeps an element.
    """

    def __init__(self, like: PackedMasks, planes: Sequence[UInt8[Tensor, " bytes"]], least: int) -> None:
        self._layout = self._names = like.filled(like.bits[:0].clone())  # names and shapes alone
        self._planes, self._least = list(planes), least

    def __getitem__(self, name: str) -> Bool[Tensor, "..."]:
        place = self._layout.place(name)
        return self._layout.unpacked(name, self._compared([p[place] for p in self._planes]))

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


class _Scratch:
    """Masks flat tensors piece by piece in the same memory, so that nothing large is held beside."""

    def __init__(self) -> None:
        self._index = torch.empty(PIECE // 8, dtype=torch.int32)
        self._bytes = torch.empty(PIECE // 8, dtype=torch.int64)
        # Each 1 of the table becomes the byte -1 (all bits set). Widened to an int16, int32 or int64, with its sign, it
        # is still all bits set or none, so AND keeps a whole element or makes it zero.
        self._table = byte_table().view(torch.int8).neg().view(torch.int64)

    def mask(self, tensor: Tensor, packed: UInt8[Tensor, " bytes"], out: Tensor) -> None:
        """By the bits of numbers, which leaves no NaN behind and is quicker than multiplying with a bool."""
        bits = _BITS[tensor.element_size()]
        pieces = (t.view(bits).split(PIECE) for t in (tensor, out))
        for value, result, part in zip(*pieces, packed.split(PIECE // 8), strict=True):
            index, keep = self._index[: part.numel()].copy_(part), self._bytes[: part.numel()]
            torch.index_select(self._table, 0, index, out=keep)
            torch.bitwise_and(value, keep.view(torch.int8)[: value.numel()], out=result)


def _zero_in_pieces(tensor: Tensor, mask: Bool[Tensor, "..."]) -> None:
    """By the bits of numbers, which leaves no NaN behind and is quicker than multiplying with a bool."""
    bits, mask = tensor.view(_BITS[tensor.element_size()]), mask.expand(tensor.shape)
    rows = max(1, PIECE * tensor.shape[0] // max(1, tensor.numel())) if tensor.ndim else 1
    scratch = torch.empty(0, dtype=bits.dtype)
    pairs = zip(bits.split(rows), mask.split(rows), strict=True) if tensor.ndim else [(bits, mask)]
    for part, keep in pairs:
        if scratch.shape != part.shape:
            scratch = torch.empty(part.shape, dtype=bits.dtype)
        part.bitwise_and_(scratch.copy_(keep).neg_())  # 1 becomes -1: all bits set
