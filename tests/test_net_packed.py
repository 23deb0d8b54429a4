"""Masks of one bit an element: unpacked as they were, applied in place, and all that a net keeps of them."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_net
from torch import nn

import cocktailsdk as cocktail
from cocktailsdk.masks.packed import PackedMasks, zero_by_numbers

SHAPES = st.lists(st.lists(st.integers(0, 9), max_size=4).map(tuple), max_size=4)


@given(SHAPES, st.integers(0, 5))
def test_what_was_packed_is_unpacked(shapes, seed):
    generator = torch.Generator().manual_seed(seed)
    masks = {f"w{i}": torch.rand(s, generator=generator) < 0.5 for i, s in enumerate(shapes)}
    packed = PackedMasks(masks.items())
    assert list(packed) == list(masks)
    assert all(torch.equal(packed[n], m) for n, m in masks.items())
    assert packed.nbytes == sum(-(-m.numel() // 8) for m in masks.values())
    assert packed.elements == sum(m.numel() for m in masks.values())
    assert all(torch.equal(m, masks[n]) for n, m in copy.deepcopy(packed).items())


def test_masks_in_any_layout_of_memory_and_of_many_elements():
    mask = torch.rand(70, 3, 5, 9) < 0.5
    large = torch.rand(2_100_001) < 0.5
    packed = PackedMasks(
        {"a": mask.transpose(0, 3), "b": mask.to(memory_format=torch.channels_last), "c": large}.items()
    )
    assert torch.equal(packed["a"], mask.transpose(0, 3))
    assert torch.equal(packed["b"], mask)
    assert torch.equal(packed["c"], large)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(600, 700), (16, 8, 3, 3), (5,), (), (0, 4)])
def test_what_is_masked_becomes_zero_in_place_and_the_rest_stays(dtype, shape):
    value = torch.randn(shape).to(dtype)
    mask = torch.rand(shape) < 0.5
    broadcast = torch.rand((*shape[:1], *[1] * (len(shape) - 1))) < 0.5
    packed = PackedMasks({"w": mask, "rows": broadcast}.items())
    for name, m in (("w", mask), ("rows", broadcast)):
        for layout in (value, value.mT.contiguous().mT if value.ndim > 1 else value):
            changed = layout.clone(memory_format=torch.preserve_format)
            if changed.numel():
                changed[(~m).expand(shape)] = float("nan")  # which a multiplication would leave
            packed.zero_masked({name: changed, "another": torch.ones(3)})
            assert torch.equal(changed, torch.where(m, value, torch.zeros((), dtype=dtype)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_the_same_becomes_zero():
    masks = {f"w{i}": torch.rand(s) < 0.5 for i, s in enumerate([(300, 500), (7,), (16, 8, 3, 3)])}
    values = {n: torch.randn(m.shape) for n, m in masks.items()}
    there = {n: v.cuda() for n, v in values.items()}
    PackedMasks(masks.items()).to(torch.device("cuda")).zero_masked(there)
    assert all(torch.equal(t.cpu(), values[n] * masks[n]) for n, t in there.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex64, torch.complex128])
def test_masks_as_numbers_leave_no_nan_behind_and_change_nothing_else(dtype):
    value = torch.randn(6, 4, 3).to(dtype)
    value[0, 0, 0] = float("nan")  # kept, and so it stays
    for shape in ((6, 4, 3), (6, 1, 1), (4, 1)):
        mask = torch.rand(shape) < 0.5
        mask[(0,) * mask.ndim] = True
        expected = torch.where(mask, value, torch.zeros((), dtype=dtype))
        for broken in (float("nan"), float("inf"), -1.0):
            for numbers in (mask, mask.to(torch.int32)):
                changed = value.masked_fill(~mask, broken)
                zero_by_numbers([changed], [numbers])
                torch.testing.assert_close(changed, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("large", [False, True], ids=["numbers", "packed"])
@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_masked_weight_is_zero_whatever_it_is_in_the_dense_network(large, broken):
    net = wide_net() if large else tiny_net()
    weights = {n: p.detach() for n, p in net.model.named_parameters()}
    for name in ("unstructured@0.5", "2:4", "channel@0.5") if large else ("unstructured@0.488", "2:4", "channel@0.469"):
        masks = net.masks[name].tensors(net.coupling)
        gone = {n: (~k).expand(weights[n].shape) for n, k in masks.items() if n in weights}
        before = {n: weights[n].clone() for n in gone}
        for n, masked in gone.items():
            weights[n].masked_fill_(masked, broken)
        for preloaded in ((), (name,)):
            with net.preload(*preloaded).using(name):
                now = {n: p.detach() for n, p in net.model.named_parameters()}
                assert all(torch.equal(now[n], before[n].masked_fill(masked, 0)) for n, masked in gone.items())
            assert not any(torch.isfinite(weights[n][masked]).any() for n, masked in gone.items())
        gradients = {n: torch.full_like(value, broken) for n, value in before.items()}
        net.zero_masked(name, gradients)
        assert all((gradients[n] == 0).equal(masked) for n, masked in gone.items())
        torch._foreach_copy_([weights[n] for n in gone], list(before.values()))


def wide_net() -> cocktail.CocktailNet:
    """Large enough that its masks stay packed in use."""
    return copy.deepcopy(made_once())


@functools.cache
def made_once() -> cocktail.CocktailNet:
    model = nn.Sequential(
        nn.Linear(64, 1200), nn.ReLU(), nn.Linear(1200, 1200), nn.BatchNorm1d(1200), nn.ReLU(), nn.Linear(1200, 4)
    )
    model.eval()
    return cocktail.sparsify(model, ["unstructured@0.5", "2:4", "channel@0.5"], example_inputs=(torch.zeros(2, 64),))


def test_a_large_net_switches_by_packed_masks_and_keeps_no_others():
    net = wide_net()
    dense = {n: t.clone() for n, t in net.model.state_dict().items()}
    for name in net.names[1:]:
        kept = net.masks[name].tensors(net.coupling)
        with net.using(name):
            now = net.model.state_dict()
            assert all(torch.equal(now[n], dense[n] * kept[n] if n in kept else t) for n, t in dense.items())
        gradients = {n: torch.ones_like(p) for n, p in net.model.named_parameters()}
        net.zero_masked(name, gradients)
        numbers = net.mask_tensors(name)
        assert numbers.keys() == set(net.masked_parameters(name)) == kept.keys() - {"3.running_mean", "3.running_var"}
        assert all(torch.equal(g, numbers[n].expand_as(g) if n in numbers else torch.ones_like(g))
                   for n, g in gradients.items())  # fmt: skip
        assert net.mask_bytes(name) <= sum(-(-m.numel() // 8) for m in kept.values())
    assert all(torch.equal(t, dense[n]) for n, t in net.model.state_dict().items())
    eligible = sum(w.numel for w in net.eligible)
    assert net.mask_bytes("unstructured@0.5") == net.mask_bytes("2:4") == eligible / 8


def test_a_large_net_may_change_its_dtype_and_be_copied():
    net = wide_net()
    net.switch("2:4").switch("dense")
    net.to(torch.float64)
    twin = copy.deepcopy(net)
    for n in (net, twin):
        with n.using("2:4"):
            assert cocktail.verify_nm(n, 2, 4).ok
            assert int((n.model.get_parameter("2.weight") == 0).sum()) == 1200 * 600
