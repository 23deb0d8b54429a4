"""Nested masks held together are the masks that they were, in fewer bits."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_net

from cocktailsdk.masks import Mask
from cocktailsdk.masks.packed import Level, PackedMasks, nested_levels

SHAPES = {"a": (5, 7), "b": (), "c": (3, 2, 9), "d": (0, 4)}


def nested(count, seed):
    generator = torch.Generator().manual_seed(seed)
    ranks = {n: torch.randint(0, count + 1, s, generator=generator) for n, s in SHAPES.items()}
    return [{n: r > i for n, r in ranks.items()} for i in range(count)]


@given(st.integers(3, 17), st.integers(0, 5))
def test_levels_are_the_masks_that_they_were_made_of(count, seed):
    masks = nested(count, seed)
    levels = nested_levels([PackedMasks(m.items()) for m in masks])
    assert levels is not None
    for level, mask in zip(levels, masks, strict=True):
        assert list(level) == list(mask) and len(level) == 4 and "a" in level and "x" not in level
        assert all(torch.equal(level[n], m) for n, m in mask.items())
        assert all(torch.equal(level.packed()[n], m) for n, m in mask.items())
    assert len(levels[0].planes) == count.bit_length()
    assert all(p is q for level in levels for p, q in zip(level.planes, levels[0].planes, strict=True))


def test_masks_that_are_not_nested_or_too_few_stay_apart():
    masks = [PackedMasks(m.items()) for m in nested(4, 0)]
    assert nested_levels(masks[:2]) is None
    assert nested_levels([masks[1], masks[0], *masks[2:]]) is None
    other = PackedMasks({**nested(4, 0)[3], "a": torch.zeros(5, 8, dtype=torch.bool)}.items())
    assert nested_levels([*masks[:3], other]) is None


def test_a_net_holds_the_unstructured_masks_in_four_bits_and_may_get_others():
    net = tiny_net()
    names = [n for n in net.names if n.startswith("unstructured")]
    before = {n: dict(m.elements) for n, m in net.masks.items()}
    levels = [net.masks[n].elements for n in names]
    assert all(isinstance(level, Level) for level in levels)
    assert all(isinstance(net.masks[n].elements, PackedMasks) for n in ("1:2", "2:4", "4:8"))
    assert len({p.data_ptr() for level in levels for p in level.planes}) == 4
    twin = copy.deepcopy(net)
    assert len({p.data_ptr() for n in names for p in twin.masks[n].elements.planes}) == 4
    for n in net.names[1:]:  # the same masks again, one after another
        net.set_mask(n, net.masks[n])
    other = {n: m.flip(0) for n, m in before[names[4]].items()}
    net.set_mask(names[4], Mask(other))  # nested no longer
    for n in net.names[1:]:
        expected = other if n == names[4] else before[n]
        assert all(torch.equal(net.masks[n].elements[k], m) for k, m in expected.items())
        assert all(torch.equal(twin.masks[n].elements[k], m) for k, m in before[n].items())
        with net.using(n):
            assert all((net.model.get_parameter(k)[~m] == 0).all() for k, m in expected.items())


@pytest.mark.parametrize("name", ["unstructured@0.2", "unstructured@0.893"])
def test_a_level_is_packed_as_a_mask_by_itself_would_be(name):
    net = tiny_net()
    level = net.masks[name].elements
    alone = PackedMasks(level.items())
    assert level.packed().alike(alone)
    assert all(torch.equal(level.packed()[n], m) for n, m in alone.items())
