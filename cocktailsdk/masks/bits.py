"""Bit packing: bool tensors in an eighth of a byte an element, and whole numbers of any width.

The bits of a byte are filled from the least significant one on, so ``[1, 0, 1, 1, 0, 0, 0, 0]`` is the byte 0b00001101.
Masks in memory, bundles and run states all use these functions.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Integer, UInt8
from torch import Tensor

from ..errors import BundleError

__all__ = ["byte_table", "pack", "pack_bits", "packed_bytes", "unpack", "unpack_bits"]

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
