"""Slim models: the one-liner, and a net's subnetworks; both compute what the masked model does."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import TinyNet, tiny_net
from torch import nn

import cocktailsdk as cocktail
from cocktailsdk import PatternError, SubnetError
from cocktailsdk.graph import couple


def trained_like(seed=0):
    return tiny_net(["2:4"], seed).model


X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def test_the_argument_is_never_altered_and_the_copy_is_plain_and_smaller():
    model = trained_like().train()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    small = cocktail.slim(model, (X,), ratio=0.5)
    assert type(small) is TinyNet
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert model.training
    assert small.widen.weight.shape == (8, 4, 3, 3)
    assert small.widen.out_channels == 8
    assert small(X).shape == (2, 5)
    assert small.widen.weight.data_ptr() != model.widen.weight.data_ptr()


@settings(max_examples=10)
@given(st.integers(0, 100), st.floats(0.0, 0.99))
def test_slim_equals_masked(seed, ratio):
    model = trained_like(seed).double().eval()
    x = X.double()
    small = cocktail.slim(model, (x,), ratio=ratio).eval()
    net = cocktail.sparsify(model, [cocktail.Channel([ratio], round_to=1)], (x,))
    with net.using(net.names[1]), torch.no_grad():
        masked, slim = net(x), small(x)
    assert (masked - slim).abs().max() <= 1e-9 * masked.abs().max()


@pytest.mark.parametrize("kind", ["flops", "params"])
@pytest.mark.parametrize("target", [0.9, 0.5, 0.25])
def test_a_target_is_met_with_the_smallest_ratio(kind, target):
    model = trained_like()
    small = cocktail.slim(model, (X,), **{kind: target})

    def size(m):
        c = couple(m, (X,))
        return c.flops() if kind == "flops" else c.params()

    assert size(small) <= target * size(model)
    # No ratio that removes less meets it.
    kept = (small.first.out_channels, small.widen.out_channels)
    seen = {kept}
    for step in range(1, 48):
        other = tuple(n - min(round(step / 48 * n), n - 1) for n in (8, 16))
        if other[0] >= kept[0] and other[1] >= kept[1] and other not in seen:
            seen.add(other)
            assert size(cocktail.slim(model, (X,), ratio=step / 48)) > target * size(model)


def test_ratio_none_removes_nothing_and_widths_may_be_rounded():
    model = trained_like().eval()
    same = cocktail.slim(model, (X,), ratio=0.0)
    assert torch.equal(same(X), model(X))
    assert cocktail.slim(model, (X,), ratio=0.4, round_to=8).widen.out_channels == 8
    assert cocktail.slim(model, (X,), ratio=0.4).widen.out_channels == 10


def test_modules_can_be_left_whole():
    model = trained_like()
    small = cocktail.slim(model, (X,), exclude_modules=["first"])
    assert small.first.out_channels == 8
    assert small.widen.out_channels == 8


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"ratio": 1.0}, "ratio"),
        ({"ratio": -0.1}, "ratio"),
        ({"ratio": "half"}, "ratio"),
        ({"flops": 0.0}, "flops"),
        ({"params": 1.5}, "params"),
        ({"flops": True}, "flops"),
        ({"flops": 0.001}, r"cannot be met: flops=0.001 \(at least 0\.\d+ stays\)"),
        ({"round_to": 0}, "round_to"),
        ({"target_modules": ["nowhere"]}, "nowhere"),
    ],
)
def test_impossible_wishes_are_refused(arguments, said):
    with pytest.raises(PatternError, match=said):
        cocktail.slim(trained_like(), (X,), **arguments)


def test_what_cannot_be_slimmed_is_refused():
    net = tiny_net(["2:4"])
    with pytest.raises(PatternError, match=r"net\.slim"):
        cocktail.slim(net, (X,))
    with pytest.raises(PatternError, match=r"nn\.Module"):
        cocktail.slim("resnet18", (X,))
    with pytest.raises(PatternError, match="no channels"):
        cocktail.slim(nn.Sequential(nn.Linear(3, 2)), (torch.randn(1, 3),))
    with pytest.raises(SubnetError):
        net.slim("channel@0.5")


@pytest.mark.parametrize("active", ["dense", "2:4", "channel@0.1"])
def test_a_nets_subnet_is_slimmed_with_its_own_statistics_whatever_is_active(active):
    net = cocktail.sparsify(trained_like(), example_inputs=(X,))
    net.recalibrate("channel@0.469", [X, X + 1])
    net.eval().switch(active)
    before = {n: t.clone() for n, t in net.model.state_dict().items()}
    for name in ("channel@0.469", "2:4", "unstructured@0.79", "dense"):
        small = net.slim(name)
        with net.using(name):
            assert torch.allclose(small(X), net(X), atol=1e-5)
    assert net.active == active
    assert all(torch.equal(t, before[n]) for n, t in net.model.state_dict().items())
    reports = {r.name: r for r in net.subnets()}
    small = net.slim("channel@0.469")
    assert sum(p.numel() for p in small.parameters()) == reports["channel@0.469"].params
    assert couple(small, (X,)).flops() == reports["channel@0.469"].flops
    assert (net.slim("2:4").widen.weight == 0).float().mean() == 0.5
