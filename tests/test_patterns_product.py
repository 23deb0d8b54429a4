"""Products: channels go, then weights of what is left, so that the slim model holds the second pattern truly."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pattern_cases import assert_whole_way, sparse
from tiny import tiny_net

import cocktailsdk as cocktail
from cocktailsdk import NM, Block, Channel, PatternError, Product, Unstructured
from cocktailsdk.masks.remaining import Remaining
from cocktailsdk.masks.tiles import covered_by_runs
from cocktailsdk.patterns import parse_pattern, resolve_patterns


@settings(max_examples=20)
@given(st.floats(0.0, 0.9), st.sampled_from([(1, 2), (2, 4), (2, 3), (4, 8)]))
def test_runs_are_counted_on_the_input_channels_that_are_left(sparsity, pair):
    n, m = pair
    net = tiny_net([Product([(Channel([sparsity], round_to=1), NM(n, m))])])
    mask = net.masks[net.names[1]]
    for w in net.eligible:
        kept = {"first.weight": 8, "widen.weight": 8, "inner.weight": 16}
        gone = mask.removed[:8] if w.name == "widen.weight" else mask.removed[8:]
        columns = (~gone).nonzero().flatten()
        assert len(gone) == kept[w.name]
        rows = (~mask.removed[8:]).nonzero().flatten()
        left = mask.elements[w.name][rows][:, columns].movedim(1, -1)
        full = len(columns) // m * m
        assert bool((left[..., :full].unflatten(-1, (-1, m)).sum(-1) == n).all()) if full else True
        assert bool(left[..., full:].all())
        assert int(mask.elements[w.name].sum()) == int(left.sum())  # nothing of what is gone is kept


@pytest.mark.parametrize("model", ["convolutions", "transformer"])
@pytest.mark.parametrize("spec", ["channel@0.5+2:4", "channel@0.3+1:2", "channel@0.25+n:m"])
def test_the_slim_model_is_truly_n_of_m(model, spec):
    net = sparse(model, [spec])
    for s in net.patterns[0].subnets():
        n, m = s.options["n"], s.options["m"]
        slim = net.slim(s.name)
        assert cocktail.verify_nm(slim, n, m)
        with net.using(s.name):
            assert cocktail.verify_nm(net, n, m)
            assert set(cocktail.verify_nm(net, n, m).checked) == set(cocktail.verify_nm(slim, n, m).checked)
        report = next(r for r in net.subnets() if r.name == s.name)
        assert report.flops < net.subnets()[0].flops
        assert report.params == sum(int((p != 0).sum()) for p in slim.parameters())


def test_n_of_m_first_and_channels_later_would_not_do():
    net = sparse("convolutions", ["channel@0.4", "2:4", "channel@0.4+2:4"])
    channel, runs = net.masks["channel@0.4"], net.masks["2:4"]
    net.set_mask("channel@0.4+2:4", cocktail.Mask(runs.elements, channel.removed))
    assert not cocktail.verify_nm(net.slim("channel@0.4+2:4"), 2, 4)


def test_sparsity_and_coverage_are_those_of_what_is_left():
    net = tiny_net([Product([(Channel([0.25], round_to=1), NM(2, 4))])])
    report = net.subnets()[1]
    assert report.sparsity == report.sparsity_exact == pytest.approx(1 - 0.75 * 0.5)
    left = Remaining(net.coupling, net.masks[report.name].removed)
    weights = [left.weight(w) for w in net.eligible]
    assert [w.shape for w in weights] == [(12, 6, 3, 3), (12, 12, 1, 1)]
    total = sum(w.numel for w in weights)
    assert report.coverage == pytest.approx(sum(covered_by_runs(w, 4) for w in weights) / total) != 1.0


def test_every_level_goes_with_every_level_and_channels_are_nested():
    pattern = Product([(Channel([0.25, 0.5]), NM(pairs=[(1, 2), (2, 4)])), (Channel([0.5]), Unstructured([0.5]))])
    assert [s.name for s in pattern.subnets()] == [
        "channel@0.25+1:2",
        "channel@0.25+2:4",
        "channel@0.5+1:2",
        "channel@0.5+2:4",
        "channel@0.5+unstructured@0.5",
    ]
    net = tiny_net([pattern])
    generator = torch.Generator().manual_seed(0)
    previous = None
    for s in pattern.subnets()[:4]:
        mask = net.make_masks(s, previous)
        if previous is not None:
            assert not bool((previous.removed & ~mask.removed).any())
            assert torch.equal(previous.removed, mask.removed) == s.name.endswith("2:4")
        previous = mask
        with torch.no_grad():
            for p in net.model.parameters():
                p.copy_(torch.randn(p.shape, generator=generator))


@pytest.mark.parametrize(
    ("spec", "pattern"),
    [
        ("channel@0.5+2:4", Product([("channel@0.5", "2:4")])),
        (" channel@0.5 + 2:4 ", Product([(Channel([0.5]), NM(2, 4))])),
        ("channel+n:m", Product([(Channel(), NM())])),
        ("channel@0.5+block4x1@0.5", Product([(Channel([0.5]), Block((4, 1), [0.5]))])),
    ],
)
def test_strings_stand_for_products(spec, pattern):
    assert parse_pattern(spec) == pattern
    assert Product(**json.loads(json.dumps(pattern.config()))) == pattern


def test_products_given_apart_are_one_pattern():
    given_apart = resolve_patterns(["channel@0.3+2:4", "channel@0.5+2:4", "channel@0.5+unstructured@0.5"])
    assert given_apart == (Product([(Channel([0.3, 0.5]), NM(2, 4)), (Channel([0.5]), Unstructured([0.5]))]),)


@pytest.mark.parametrize(
    "bad",
    [
        "2:4+channel@0.5",
        "channel@0.5+channel@0.3",
        "channel@0.5+2:4+1:2",
        "channel@0.5+",
        "+2:4",
        "channel@0.5+4:2",
        "chanel@1+2:4",
    ],
)
def test_what_is_no_product_is_refused(bad):
    with pytest.raises(PatternError):
        parse_pattern(bad)


@pytest.mark.parametrize("pairs", [[], "channel@0.5+2:4", ["channel@0.5"], [("channel", 3)], [("a", "b", "c")], 7])
def test_what_are_no_pairs_is_refused(pairs):
    with pytest.raises(PatternError):
        Product(pairs)


@pytest.mark.parametrize("model", ["convolutions", "transformer"])
def test_products_go_the_whole_way_and_only_what_is_left_is_stored(model, tmp_path):
    net = sparse(model, ["channel@0.4+2:4", "channel@0.5+block2x2@0.5", "channel@0.25+unstructured@0.5"])
    assert_whole_way(net, tmp_path / "bundle")
    from safetensors import safe_open

    with safe_open(tmp_path / "bundle" / "subnets.safetensors", "pt") as file:
        left = Remaining(net.coupling, net.masks["channel@0.4+2:4"].removed)
        runs = sum(covered_by_runs(left.weight(w), 4) // 4 for w in net.eligible)
        assert file.get_tensor("channel@0.4+2:4.runs").numel() == (3 * runs + 7) // 8
        left = Remaining(net.coupling, net.masks["channel@0.25+unstructured@0.5"].removed)
        held = sum(left.weight(w).numel for w in net.eligible)
        assert (held + 7) // 8 in {file.get_tensor(k).numel() for k in file.keys() if "elements" in k}  # noqa: SIM118
