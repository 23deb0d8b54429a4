"""N:M masks: every run holds N, along the input channels, remainders whole; and the check of the same."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pattern_cases import weights
from tiny import TinyNet, tiny_net
from torch import nn

import cocktailsdk as cocktail
from cocktailsdk import NM, PatternError
from cocktailsdk.masks.tiles import covered_by_runs, runs, unruns
from cocktailsdk.patterns.nm import nm_mask

PAIRS = st.integers(2, 10).flatmap(lambda m: st.tuples(st.integers(1, m - 1), st.just(m)))


@given(weights(), PAIRS, st.integers(0, 5), st.booleans())
def test_every_run_keeps_the_n_largest_and_remainders_are_whole(made, pair, seed, ties):
    weight, inputs = made
    n, m = pair
    value = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))
    if ties:
        value = value.round()
    keep = nm_mask(weight, value, n, m)
    assert keep.shape == value.shape
    # One line of input channels at a time, found without the code under test.
    per_group = inputs
    lines = value.movedim(weight.in_axis, 0).reshape(-1, per_group, *value.movedim(weight.in_axis, 0).shape[1:])
    kept = keep.movedim(weight.in_axis, 0).reshape(lines.shape)
    for group, mask in zip(lines, kept, strict=True):
        for column, bits in zip(
            group.reshape(per_group, -1).T.tolist(), mask.reshape(per_group, -1).T.tolist(), strict=True
        ):
            full = per_group // m * m
            for start in range(0, full, m):
                run = [abs(v) for v in column[start : start + m]]
                best = sorted(range(m), key=lambda i, run=run: (-run[i], i))[:n]
                assert [i for i in range(m) if bits[start + i]] == sorted(best)
            assert all(bits[full:])
    assert int((~keep).sum()) == covered_by_runs(weight, m) // m * (m - n)


@given(weights(), st.integers(2, 10))
def test_runs_and_back_is_the_identity(made, m):
    weight, _ = made
    value = torch.arange(weight.numel).reshape(weight.shape).float()
    again = unruns(weight, runs(weight, value, m), -1.0)
    assert torch.equal(again[again >= 0], value[again >= 0])
    assert int((again >= 0).sum()) == covered_by_runs(weight, m)


def test_by_default_three_networks_of_half_the_weights():
    net = tiny_net("n:m")
    assert net.names == ["dense", "1:2", "2:4", "4:8"]
    assert [r.sparsity_exact for r in net.subnets()[1:]] == [0.5] * 3


def test_remainders_are_counted_as_not_covered():
    net = tiny_net([NM(2, 3)])  # 8 and 16 input channels: 6 and 15 are covered
    report = net.subnets()[1]
    assert report.sparsity_exact == pytest.approx(1 / 3)
    widen, inner = (w.numel for w in net.eligible)
    assert report.coverage == pytest.approx((widen * 6 / 8 + inner * 15 / 16) / (widen + inner))


@pytest.mark.parametrize(
    ("total", "expected"), [(10, [[], *[[0]] * 3, *[[1]] * 3, *[[2]] * 3]), (4, [[], [0], [1], [2]])]
)
def test_rounds_are_those_of_the_method(total, expected):
    levels = NM().subnets()
    assert [[levels.index(s) for s in r] for r in NM().rounds(total)] == expected


@given(st.integers(1, 12), st.integers(1, 5))
def test_every_network_is_trained_in_some_round_in_order(total, pairs):
    pattern = NM(pairs=[(1, m) for m in range(2, 2 + pairs)])
    plan = pattern.rounds(total)
    assert len(plan) == total
    order = [s.name for r in plan for s in r]
    assert list(dict.fromkeys(order)) == [s.name for s in pattern.subnets()]


@pytest.mark.parametrize("bad", [(0, 4), (4, 4), (5, 4), (-1, 2), (1.5, 4), (True, 2)])
def test_bad_pairs_are_refused(bad):
    with pytest.raises(PatternError):
        NM(*bad)


def test_half_a_pair_and_pairs_twice_are_refused():
    for arguments in ({"n": 2}, {"pairs": []}, {"pairs": [(1, 2), (1, 2)]}, {"n": 1, "m": 2, "pairs": [(1, 2)]}):
        with pytest.raises(PatternError):
            NM(**arguments)


def test_verify_nm_accepts_the_network_that_is_masked_and_names_what_fails():
    net = tiny_net("n:m")
    dense = cocktail.verify_nm(net, 2, 4)
    assert not dense.ok
    assert [f.module for f in dense.failures] == ["widen", "inner"]
    assert dense.failures[0].worst == 4
    with net.using("2:4", changes="discard"):
        assert cocktail.verify_nm(net, 2, 4).ok
        assert cocktail.verify_nm(net.model, 2, 4).ok
        assert cocktail.verify_nm(net.model, 2, 4).checked == ("widen.weight", "inner.weight")
        assert not cocktail.verify_nm(net, 1, 4).ok
        with torch.no_grad():
            net.model.inner.weight[3, 4:8] = 1.0
        found = cocktail.verify_nm(net.model, 2, 4)
        assert [(f.module, f.worst, f.runs) for f in found.failures] == [("inner", 4, 1)]
        assert not found


def test_verify_nm_checks_a_lone_layer_and_what_is_targeted():
    layer = nn.Linear(8, 3)
    assert not cocktail.verify_nm(layer, 2, 4).ok
    with torch.no_grad():
        layer.weight[:, [0, 3, 4, 6]] = 0
    assert cocktail.verify_nm(layer, 2, 4).ok
    model = TinyNet()
    with pytest.raises(PatternError, match="first input"):
        cocktail.verify_nm(model, 2, 4, target_modules=["first input"])
    assert cocktail.verify_nm(model, 2, 4, target_modules=["fc"]).checked == ("fc.weight",)


def test_verify_nm_refuses_what_it_cannot_check():
    with pytest.raises(PatternError, match="no weight"):
        cocktail.verify_nm(nn.ReLU(), 2, 4)
    with pytest.raises(PatternError, match="0 < n < m"):
        cocktail.verify_nm(nn.Linear(4, 4), 4, 2)
