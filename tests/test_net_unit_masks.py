"""Masks of channel units by rows and columns: the same as by elements, whatever the tensors' memory looks like."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_net

from cocktailsdk.masks import device_cache
from cocktailsdk.masks.device_cache import UnitMasks

LEVELS = ("channel@0.1", "channel@0.469", "channel@0.651")


@pytest.mark.parametrize("small", [0, 1 << 12], ids=["rows and columns", "at once"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex128])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_rows_and_columns_become_zero_whatever_was_there(small, dtype, layout, monkeypatch):
    monkeypatch.setattr(device_cache, "_SMALL", small)
    monkeypatch.setattr(device_cache, "PIECE", 100)  # a few rows at a time
    net = tiny_net()
    assert UnitMasks.fits(net.coupling)
    for level in LEVELS:
        removed = net.masks[level].removed
        masks, expected = UnitMasks(net.coupling, removed), net.coupling.masks(removed)
        assert len(masks) == len(list(masks)) and masks.nbytes > 0
        assert all(torch.equal(masks[n], expected[n]) for n in masks)
        assert all(bool(keep.all()) for n, keep in expected.items() if n not in masks)
        whole = {}
        for n, t in net.model.state_dict().items():
            broken = t.to(dtype).masked_fill(~expected[n], float("nan")) if n in expected else t
            whole[n] = broken.to(memory_format=layout) if t.ndim == 4 else broken
        into = {n: torch.full_like(t, 7) for n, t in whole.items()}
        alone = {n: t.clone(memory_format=torch.preserve_format) for n, t in whole.items()}
        masks.zero_masked(whole, into)
        masks.zero_masked(alone)
        for n, t in whole.items():
            wanted = t.masked_fill(~masks[n], 0) if n in masks else t
            assert torch.equal(alone[n], wanted)
            assert torch.equal(into[n], wanted if n in masks else torch.full_like(t, 7))


def test_what_is_of_one_unit_goes_as_a_whole():
    net = tiny_net()
    fields = {"first.weight": (torch.zeros(1, 1, 1, 1, dtype=torch.int64),), "fc.bias": (torch.ones(5).long(),)}
    object.__setattr__(net.coupling, "fields", fields)  # the first unit makes all of it
    masks = UnitMasks(net.coupling, torch.arange(24) == 0)
    weights = {"first.weight": torch.full((8, 3, 3, 3), float("nan")), "fc.bias": torch.ones(5)}
    masks.zero_masked(weights)
    assert list(masks) == ["first.weight"]
    assert not weights["first.weight"].any() and weights["fc.bias"].all()
