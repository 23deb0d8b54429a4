"""Masks as numbers, and numbers as bits: what memory, bundles and run states hold of masks.

- An element takes a bit. The bits of a byte are filled from the least significant one on, so
  ``[1, 0, 1, 1, 0, 0, 0, 0]`` is the byte 0b00001101.
- A run of an N:M mask is its *rank* among all ways to keep N of M places: 3 bits for a run of 2:4, not 4.
- Nested masks together are, for each element, how many of them keep it, which says of every mask whether it does. Ten
  masks of one element take four bits so, instead of ten. In memory the counts are *bit planes*: one packed mask for
  each binary digit of the counts, so that one operation on a byte works on eight elements. In files they are *levels*:
  one number an element.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from jaxtyping import Bool, Integer, UInt8
from torch import Tensor

from ..errors import BundleError

MAX_RUN = 16  # longer runs are stored as plain bits: the table of ranks has 2^M entries
PIECE = 1 << 18  # elements at a time on a CPU: few enough for the caches, enough that calls do not count
_CHUNK = 1 << 20  # values at a time; a multiple of 8, so that every chunk begins with a byte of its own

# Eight bools are eight bytes b_0 … b_7 of 0 or 1. Read as one little-endian int64 they are the sum of b_i * 2^(8i).
# This factor is 2^7 + 2^14 + … + 2^56. In the product b_i * 2^(8i) meets 2^(7(8-i)) and lands on bit 56 + i: so the
# highest byte is the packed one. The exponents 8i + 7j of all 64 partial products differ: no sum carries into a bit.
_GATHER = 0x0102040810204080


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that ``count`` numbers of ``bits`` bits take."""
    return (count * bits + 7) // 8


def pack_bits(flags: Bool[Tensor, "..."]) -> UInt8[Tensor, " bytes"]:
    """One bit an element in row-major order, on the tensor's device; spare bits of the last byte are zero."""
    flat = flags.reshape(-1)
    full = flat.numel() // 8 * 8
    out = torch.empty(packed_bytes(flat.numel(), 1), dtype=torch.uint8, device=flags.device)
    for begin in range(0, full, _CHUNK):
        # a copy, which is aligned for int64 and may be changed in place
        eights = flat[begin : min(begin + _CHUNK, full)].clone().view(torch.int64)
        # int64 is signed, so the shift fills in ones where bit 63 is set; as a uint8 only the lowest byte stays
        out[begin // 8 : begin // 8 + eights.numel()] = eights.mul_(_GATHER).bitwise_right_shift_(56)
    if full < flat.numel():
        last = torch.zeros(8, dtype=torch.bool, device=flags.device)
        last[: flat.numel() - full] = flat[full:]
        out[-1:] = last.view(torch.int64).mul_(_GATHER).bitwise_right_shift_(56)
    return out


def byte_table() -> Tensor:
    """For every packed byte its eight bools, as one int64: a single look-up unpacks eight elements.

    It is made when it is needed and not kept by the module: a first call under a fake tensor mode would break all later
    ones.
    """
    flags = ((torch.arange(256)[:, None] >> torch.arange(8)) & 1).bool()
    table = torch.empty(256, dtype=torch.int64)
    table[pack_bits(flags).long()] = flags.view(torch.int64)[:, 0]
    return table


def unpack_bits(packed: UInt8[Tensor, " bytes"], table: Tensor | None = None) -> Bool[Tensor, " elements"]:
    """The inverse of :func:`pack_bits`: eight elements a byte, the spare bits of the last one included.

    Args:
        packed: The bytes.
        table: What :func:`byte_table` gives, on their device.
    """
    table = byte_table().to(packed.device) if table is None else table
    if packed.device.type != "cpu":
        return table.index_select(0, packed.to(torch.int32)).view(torch.bool)
    out = torch.empty(packed.numel(), dtype=torch.int64)
    for part, into in zip(packed.split(PIECE // 8), out.split(PIECE // 8), strict=True):
        torch.index_select(table, 0, part.to(torch.int32), out=into)
    return out.view(torch.bool)


def pack(values: Integer[Tensor, " n"], bits: int) -> UInt8[Tensor, " bytes"]:
    """Whole numbers below ``2^bits``, one after another, the least significant bit first.

    Of three bits, 5 and 3 are 0b011_101: the second number's bits follow above the first's.
    """
    if bits == 1:
        return pack_bits(values.bool())
    places = torch.arange(bits)
    chunks = [pack_bits((part.to(torch.int32)[:, None] >> places & 1).bool()) for part in values.split(_CHUNK)]
    return torch.cat(chunks)


def unpack(packed: UInt8[Tensor, " bytes"], bits: int, count: int) -> Integer[Tensor, " n"]:
    """The inverse of :func:`pack`, as uint8 for up to eight bits and as int32 for more.

    Raises:
        BundleError: The length does not fit the count, or spare bits are set.
    """
    if packed.dtype != torch.uint8 or packed.ndim != 1 or packed.numel() != packed_bytes(count, bits):
        raise BundleError(
            f"packed masks hold {packed.numel()} elements of {packed.dtype}, but {count} values of {bits} bits take "
            f"{packed_bytes(count, bits)} bytes"
        )
    out = torch.zeros(count, dtype=torch.uint8 if bits <= 8 else torch.int32)
    table = byte_table()
    for part, into in zip(packed.split(_CHUNK // 8 * bits), out.split(_CHUNK), strict=True):
        flags = unpack_bits(part, table)
        if flags[into.numel() * bits :].any():
            raise BundleError("packed masks have bits set past their end")
        columns = flags[: into.numel() * bits].view(-1, bits)
        for place in range(bits):
            into |= columns[:, place].to(out.dtype) << place
    return out


@lru_cache(maxsize=32)
def _codes(n: int, m: int) -> tuple[int, ...]:
    """All ways to keep N of M as numbers whose bit ``i`` is place ``i``, ascending.

    Of 2:4 they are 0b0011, 0b0101, 0b0110, 0b1001, 0b1010 and 0b1100, of the ranks 0 … 5.
    """
    return tuple(sorted(sum(1 << i for i in places) for places in itertools.combinations(range(m), n)))


def rank_bits(n: int, m: int) -> int:
    """Bits that one run takes: 1 for 1:2, 3 for 2:4, 7 for 4:8."""
    return max(1, (math.comb(m, n) - 1).bit_length())


def to_ranks(keep: Bool[Tensor, "runs m"], n: int) -> Integer[Tensor, " runs"] | None:
    """The rank of each run; ``None`` if some run does not keep exactly N."""
    m = keep.shape[-1]
    ranks = torch.full((1 << m,), -1, dtype=torch.int32)
    ranks[list(_codes(n, m))] = torch.arange(math.comb(m, n), dtype=torch.int32)
    # packed bit by bit and read as numbers of m bits, runs are their codes
    found = ranks[unpack(pack_bits(keep), m, len(keep)).int()]
    return None if bool((found < 0).any()) else found


def from_ranks(ranks: Integer[Tensor, " runs"], n: int, m: int) -> Bool[Tensor, "runs m"]:
    """The inverse of :func:`to_ranks`.

    Raises:
        BundleError: A rank that stands for no run.
    """
    codes = torch.tensor(_codes(n, m), dtype=torch.int32)
    if ranks.numel() and int(ranks.max()) >= codes.numel():
        raise BundleError(f"a {n}:{m} mask has a run numbered {int(ranks.max())} of {codes.numel()}")
    return unpack_bits(pack(codes[ranks.int()], m))[: ranks.numel() * m].view(-1, m)


def bit_planes(masks: Sequence[UInt8[Tensor, " bytes"]]) -> list[UInt8[Tensor, " bytes"]] | None:
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


def level_bits(levels: int) -> int | None:
    """Bits that a level in ``0 … levels`` takes: 4 up to 15 levels, 8 up to 255; ``None`` beyond."""
    return next((b for b in (1, 2, 4, 8) if levels < 1 << b), None)


def to_levels(masks: Sequence[Bool[Tensor, " n"]]) -> UInt8[Tensor, " n"] | None:
    """At most 255 nested masks as one level an element; ``None`` if they are not nested.

    The level 0 is of an element that all masks keep, ``k`` of one that the ``k``-th mask is the first to mask. So of
    three masks the counts 3, 2, 1, 0 are the levels 0, 3, 2, 1.
    """
    planes = bit_planes([pack_bits(m) for m in masks])
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
