"""Masks as few bits: whole numbers of any width, N:M runs as ranks, nested masks as levels."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Bool, UInt8
from torch import Tensor

from ..errors import BundleError

MAX_RUN = 16  # N:M runs longer than this are stored as plain bits

_CHUNK = 1 << 20  # values at a time; a multiple of 8, so that every chunk ends on a whole byte


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that ``count`` numbers of ``bits`` bits take."""
    return (count * bits + 7) // 8


def pack(values: npt.NDArray[np.generic], bits: int) -> UInt8[Tensor, " bytes"]:
    """Whole numbers below ``2^bits``, one after another, the least significant bit first."""
    parts = []
    places = np.arange(bits, dtype=np.uint16)
    for start in range(0, values.size, _CHUNK):
        chunk = values[start : start + _CHUNK].astype(np.uint16)
        spread = ((chunk[:, None] >> places) & 1).astype(np.uint8)
        parts.append(np.packbits(spread.reshape(-1), bitorder="little"))
    return torch.from_numpy(np.concatenate(parts) if parts else np.zeros(0, np.uint8))


def unpack(packed: UInt8[Tensor, " bytes"], bits: int, count: int) -> npt.NDArray[np.uint16]:
    """The inverse of :func:`pack`.

    Raises:
        BundleError: The length does not fit the count, or spare bits are set.
    """
    data = packed.numpy()
    if data.dtype != np.uint8 or data.ndim != 1 or data.size != packed_bytes(count, bits):
        raise BundleError(
            f"packed masks hold {data.size} bytes of {data.dtype}, but {count} values of {bits} bits take "
            f"{packed_bytes(count, bits)}"
        )
    out = np.empty(count, np.uint16)
    places = (1 << np.arange(bits, dtype=np.uint16)).astype(np.uint16)
    for start in range(0, count, _CHUNK):
        n = min(_CHUNK, count - start)
        first = start * bits // 8
        spread = np.unpackbits(data[first : first + packed_bytes(n, bits)], bitorder="little")
        if spread[n * bits :].any():
            raise BundleError("packed masks have bits set past their end")
        out[start : start + n] = spread[: n * bits].reshape(n, bits).astype(np.uint16) @ places
    return out


def level_bits(levels: int) -> int | None:
    """Bits that a level in ``0 … levels`` takes: 4 up to 15 levels, 8 up to 255; ``None`` beyond."""
    return next((b for b in (1, 2, 4, 8) if levels < 1 << b), None)


def to_levels(kept: Sequence[Bool[Tensor, " n"]]) -> npt.NDArray[np.uint8] | None:
    """Nested masks as one number an element: 0 kept by all, k first masked by the k-th; ``None`` if not nested."""
    levels = np.zeros(kept[0].numel(), np.uint8)
    for k, keep in enumerate(kept, 1):
        gone = ~keep.numpy()
        if (~gone & (levels > 0)).any():
            return None
        levels[gone & (levels == 0)] = k
    return levels


def from_levels(
    levels: npt.NDArray[np.uint16], count: int, which: Sequence[int] | None = None
) -> list[Bool[Tensor, " n"]]:
    """The inverse of :func:`to_levels`: the masks of these levels, or of all ``1 … count``.

    Raises:
        BundleError: A level above ``count``.
    """
    if levels.size and int(levels.max()) > count:
        raise BundleError(f"a mask has level {int(levels.max())}, but its pattern only {count}")
    return [torch.from_numpy((levels == 0) | (levels > k)) for k in which or range(1, count + 1)]


@lru_cache(maxsize=32)
def _codes(n: int, m: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """All masks of N among M as numbers, ascending, and for every number its rank or -1."""
    codes = np.array(sorted(sum(1 << i for i in c) for c in itertools.combinations(range(m), n)), np.int64)
    rank = np.full(1 << m, -1, np.int64)
    rank[codes] = np.arange(codes.size)
    return codes, rank


def run_bits(n: int, m: int) -> int:
    """Bits that one run takes: 1 for 1:2, 3 for 2:4, 7 for 4:8."""
    return max(1, (math.comb(m, n) - 1).bit_length())


def to_ranks(keep: Bool[Tensor, "runs m"], n: int) -> npt.NDArray[np.int64] | None:
    """Runs as ranks among all ways to keep N of M; ``None`` if some run does not keep exactly N."""
    m = keep.shape[-1]
    numbers = keep.numpy().astype(np.int64) @ (1 << np.arange(m, dtype=np.int64))
    ranks = _codes(n, m)[1][numbers]
    return None if (ranks < 0).any() else ranks


def from_ranks(ranks: npt.NDArray[np.uint16], n: int, m: int) -> Bool[Tensor, "runs m"]:
    """The inverse of :func:`to_ranks`.

    Raises:
        BundleError: A rank that stands for no run.
    """
    codes, _ = _codes(n, m)
    if ranks.size and int(ranks.max()) >= codes.size:
        raise BundleError(f"a {n}:{m} mask has a run numbered {int(ranks.max())} of {codes.size}")
    return torch.from_numpy(((codes[ranks][:, None] >> np.arange(m)) & 1).astype(bool))
