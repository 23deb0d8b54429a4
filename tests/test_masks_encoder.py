"""Masks as packed tensors and entries: bits, ranks, levels, and masks that build on others."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from cocktailsdk.masks.bits import pack, unpack
from cocktailsdk.masks.combinations import from_ranks, rank_bits, to_ranks
from cocktailsdk.masks.nested import from_levels, level_bits, to_levels


@given(st.integers(1, 16), st.lists(st.integers(0, 2**16 - 1), max_size=100))
def test_packing_whole_numbers_and_back(bits, numbers):
    values = torch.tensor([n % (1 << bits) for n in numbers], dtype=torch.int32)
    packed = pack(values, bits)
    assert packed.numel() == (len(numbers) * bits + 7) // 8
    assert unpack(packed, bits, len(numbers)).tolist() == values.tolist()


@given(st.integers(2, 16).flatmap(lambda m: st.tuples(st.integers(1, m - 1), st.just(m))), st.integers(0, 99))
def test_packing_runs_and_back(pair, seed):
    n, m = pair
    scores = torch.rand(17, m, generator=torch.Generator().manual_seed(seed))
    keep = torch.zeros(17, m, dtype=torch.bool).scatter_(1, scores.argsort(1)[:, :n], True)
    ranks = to_ranks(keep, n)
    assert torch.equal(from_ranks(unpack(pack(ranks, rank_bits(n, m)), rank_bits(n, m), 17), n, m), keep)
    keep[3] = True
    assert to_ranks(keep, n) is None


def test_bits_are_few():
    assert [rank_bits(1, 2), rank_bits(2, 4), rank_bits(4, 8)] == [1, 3, 7]
    assert [level_bits(n) for n in (1, 2, 3, 4, 15, 16, 255, 256)] == [1, 2, 2, 4, 4, 8, 8, None]


@given(st.integers(1, 12), st.integers(0, 99))
def test_packing_nested_masks_and_back(count, seed):
    level = torch.randint(0, count + 1, (50,), generator=torch.Generator().manual_seed(seed))
    kept = [(level == 0) | (level > k) for k in range(1, count + 1)]
    levels = to_levels(kept)
    assert levels.tolist() == level.tolist()
    again = from_levels(unpack(pack(levels, 4), 4, 50), count)
    assert all(torch.equal(a, b) for a, b in zip(again, kept, strict=True))
    assert to_levels([torch.tensor([False, True]), torch.tensor([True, True])]) is None
