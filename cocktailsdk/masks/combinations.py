"""Runs of an N:M mask as ranks among all ways to keep N of M places: 3 bits for a run of 2:4, where its mask has 4."""

from __future__ import annotations

import itertools
import math
from functools import lru_cache

import torch
from jaxtyping import Bool, Integer
from torch import Tensor

from ..errors import BundleError
from .bits import pack, pack_bits, unpack, unpack_bits

__all__ = ["MAX_RUN", "from_ranks", "rank_bits", "to_ranks"]

MAX_RUN = 16  # longer runs are stored as plain bits: the table of ranks has 2^M entries


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
