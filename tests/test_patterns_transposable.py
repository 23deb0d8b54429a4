"""Transposable N:M: rows and columns of every tile hold N, by the best choice there is; remainders are whole."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pattern_cases import assert_whole_way, sparse, weights
from scipy.optimize import linprog
from tiny import tiny_net

import cocktailsdk as cocktail
from cocktailsdk import NM, PatternError, Transposable
from cocktailsdk.masks import Mask
from cocktailsdk.masks.tiles import covered_by_tiles, matrices
from cocktailsdk.patterns import UMG, parse_pattern, resolve_patterns
from cocktailsdk.patterns.transposable import best_squares
from cocktailsdk.patterns.unit_scores import unit_scores

PAIRS = st.sampled_from([(1, 2), (1, 4), (2, 4), (3, 4), (2, 3), (4, 8), (2, 8), (3, 6)])


@given(PAIRS, st.integers(0, 9), st.booleans())
def test_rows_and_columns_hold_n_and_no_other_choice_keeps_more(pair, seed, ties):
    n, m = pair
    values = torch.randn(3, m, m, generator=torch.Generator().manual_seed(seed))
    values = values.round() if ties else values
    keep = best_squares(values, n)
    assert bool((keep.sum(1) == n).all())
    assert bool((keep.sum(2) == n).all())
    sums = np.zeros((2 * m, m * m))  # the polytope's corners are whole, so a linear program finds the best mask
    for i in range(m):
        sums[i, i * m : (i + 1) * m] = 1
        sums[m + i, i::m] = 1
    for value, kept in zip(values.abs().double(), keep, strict=True):
        best = -linprog(-value.numpy().ravel(), A_eq=sums, b_eq=np.full(2 * m, n), bounds=(0, 1)).fun
        assert float((value * kept).sum()) == pytest.approx(best, rel=1e-9, abs=1e-9)


@settings(max_examples=50)
@given(weights(), PAIRS)
def test_both_ways_in_every_tile_and_remainders_whole(made, pair):
    weight, _ = made
    n, m = pair
    value = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    pattern = Transposable(n, m)
    umg = UMG(None, (weight,), {"w": value})
    subnet = pattern.subnets()[0]
    mask = pattern.mask(subnet, umg)
    for kept in matrices(weight, mask.elements["w"]):
        rows, columns = (size // m * m for size in kept.shape)
        for r, c in itertools.product(range(0, rows, m), range(0, columns, m)):
            tile = kept[r : r + m, c : c + m]
            assert tile.sum(0).tolist() == tile.sum(1).tolist() == [n] * m
        assert bool(kept[rows:].all())
        assert bool(kept[:, columns:].all())
    covered = covered_by_tiles(weight, m, m)
    assert pattern.coverage(subnet, mask, umg) == covered / weight.numel
    assert pattern.exact_sparsity(subnet, mask, umg) == pytest.approx(1 - n / m if covered else 0.0)


def test_the_check_looks_both_ways():
    net = tiny_net(["2:4", "transposable2:4"])
    with net.using("transposable2:4"):
        assert cocktail.verify_nm(net, 2, 4)
        assert cocktail.verify_nm(net, 2, 4, transposable=True)
        assert cocktail.verify_nm(net.model, 2, 4, transposable=True)
        assert not cocktail.verify_nm(net, 1, 4, transposable=True)
    with net.using("2:4"):
        assert cocktail.verify_nm(net, 2, 4)
        found = cocktail.verify_nm(net, 2, 4, transposable=True)
        assert [f.module for f in found.failures] == ["widen", "inner"]


def test_masks_enter_the_channel_score_as_those_of_n_m_do():
    net = tiny_net(["transposable2:4"])
    mask = net.masks["transposable2:4"]
    scores = [unit_scores(net.umg(made={name: mask}), 0.8) for name in ("transposable", "n:m")]
    assert torch.equal(*scores)
    both = {"n:m": Mask(), "transposable": mask}
    assert not torch.equal(unit_scores(net.umg(made=both), 0.8), scores[0])


def test_strings_and_arguments():
    assert parse_pattern("transposable2:4") == Transposable(2, 4)
    assert parse_pattern("transposable") == Transposable() != NM()
    assert resolve_patterns(["transposable1:2", "transposable2:4"]) == (Transposable(pairs=[(1, 2), (2, 4)]),)
    assert Transposable(**Transposable(2, 4).config()) == Transposable(2, 4)
    assert [[s.name for s in r] for r in Transposable().rounds(4)] == [
        [],
        *([f"transposable{p}"] for p in ("1:2", "2:4", "4:8")),
    ]
    for bad in ("transposable4:2", "transposable2", "transposable2:4@0.5"):
        with pytest.raises(PatternError):
            parse_pattern(bad)


@pytest.mark.parametrize("model", ["convolutions", "transformer"])
def test_they_go_the_whole_way_and_are_stored_by_run(model, tmp_path):
    net = sparse(model, ["transposable1:2", "transposable2:4", "channel@0.25+transposable2:4"])
    assert_whole_way(net, tmp_path / "bundle")
    assert cocktail.verify_nm(net.slim("channel@0.25+transposable2:4"), 2, 4, transposable=True)
    masks = json.loads((tmp_path / "bundle" / "bundle.json").read_text())["masks"]
    assert [e["tensor"] for e in masks if e.get("square")] == [
        "transposable1:2.runs",
        "transposable2:4.runs",
        "channel@0.25+transposable2:4.runs",
    ]
