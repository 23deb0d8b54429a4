"""Attention heads: whole heads of every attention go, exactly the asked share, and nothing else."""

from __future__ import annotations

import json

import pytest
import torch
from graph_cases import Heads as HeadsOfFour
from graph_cases import Streamed
from hypothesis import given
from hypothesis import strategies as st
from pattern_cases import assert_whole_way, sparse
from torch import nn

import cocktailsdk as cocktail
from cocktailsdk import Heads, PatternError
from cocktailsdk.graph import couple
from cocktailsdk.patterns import in_order, parse_pattern
from cocktailsdk.patterns.channel import Channel
from cocktailsdk.patterns.nm import NM
from cocktailsdk.patterns.unit_groups import head_groups
from cocktailsdk.patterns.unit_scores import unit_scores


class Grouped(HeadsOfFour):
    """Four heads of queries for two of keys and values."""

    kv_heads = 2

    def attend(self, q, k, v):
        return super().attend(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1))


class GroupedStream(Streamed):
    inner = Grouped


class Matmul(HeadsOfFour):
    def attend(self, q, k, v):
        return (q @ k.transpose(-2, -1)).softmax(-1) @ v


class MatmulStream(Streamed):
    inner = Matmul


@pytest.fixture(scope="module")
def net():
    return sparse("transformer", [Heads([0.25, 0.5, 0.75])])


@pytest.mark.parametrize(
    ("make", "shape", "found"),
    [
        (Streamed, (2, 6, 12), [(4, 4)]),
        (MatmulStream, (2, 6, 12), [(4, 4)]),
        (GroupedStream, (2, 6, 12), [(2, 8)]),  # a set of keys and values goes with both of its heads
        (lambda: nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), (2, 6, 16), [(4, 12)]),
        (lambda: nn.Sequential(nn.Conv2d(3, 8, 1), nn.GroupNorm(2, 8), nn.Conv2d(8, 4, 1)), (2, 3, 4, 4), []),
    ],
)
def test_units_are_heads_where_they_attend_one_by_one(make, shape, found):
    torch.manual_seed(0)
    coupling = couple(make().eval(), (torch.randn(shape),))
    assert [(g.size, g.channels) for g in head_groups(coupling)] == found


@given(sparsity=st.floats(0.0, 1.0))
def test_of_every_attention_the_asked_share_of_heads_goes_but_never_all(net, sparsity):
    pattern, umg = Heads([sparsity]), net.umg()
    subnet = pattern.subnets()[0]
    mask, groups = pattern.mask(subnet, umg), head_groups(net.coupling)
    assert len(groups) == 2
    for g in net.coupling.groups:
        gone = int(mask.removed[g.start : g.stop].sum())
        assert gone == (min(round(sparsity * 4), 3) if g in groups else 0)
    assert pattern.exact_sparsity(subnet, mask, umg) == int(mask.removed.sum()) / 8


def test_the_heads_of_least_score_go_nested(net):
    scores = unit_scores(net.umg(), 0.8)
    for g in head_groups(net.coupling):
        order = scores[g.start : g.stop].argsort(stable=True).tolist()
        for k, name in enumerate(net.names[1:], 1):
            assert sorted(order[:k]) == net.masks[name].removed[g.start : g.stop].nonzero().flatten().tolist()


def test_coverage_is_what_belongs_to_heads(net):
    total = sum(w.numel for w in net.eligible)
    assert [r.coverage for r in net.subnets()[1:]] == pytest.approx([2 * 4 * 16 * 16 / total] * 3)


def test_masks_made_before_enter_the_score():
    net = sparse("transformer", ["unstructured@0.5", "heads@0.5"])
    umg = net.umg(made={"unstructured": net.masks["unstructured@0.5"]})
    mask = net.pattern("heads").mask(net.subnet("heads@0.5"), umg)
    assert torch.equal(mask.removed, net.masks["heads@0.5"].removed)
    assert [p.name for p in in_order([Heads(), Channel(), NM()])] == ["n:m", "heads", "channel"]


def test_a_model_without_heads_is_refused():
    with pytest.raises(PatternError, match="no attention heads"):
        sparse("convolutions", ["heads@0.5"])


def test_strings_and_arguments():
    assert parse_pattern("heads@0.5") == Heads([0.5])
    assert Heads(**Heads([0.5], beta=0.3).config()) == Heads([0.5], beta=0.3)
    for bad in ({"beta": 2.0}, {"sparsities": [-1.0]}, {"rounds": 0}):
        with pytest.raises(PatternError, match="heads"):
            Heads(**bad)


def test_heads_go_the_whole_way_and_are_stored_by_unit(tmp_path):
    net = sparse("transformer", ["heads@0.25", "heads@0.5", "heads@0.5+2:4", "channel@0.25"])
    loaded = assert_whole_way(net, tmp_path / "bundle")
    assert head_groups(loaded.coupling) == head_groups(net.coupling)
    masks = json.loads((tmp_path / "bundle" / "bundle.json").read_text())["masks"]
    assert [e["levels"] for e in masks if e.get("units")] == [
        ["heads@0.25", "heads@0.5"],
        ["heads@0.5+2:4"],
        ["channel@0.25"],
    ]
    slim = net.slim("heads@0.5")
    assert slim.blocks[0].attn.q.weight.shape == (8, 16)
    assert slim.blocks[0].attn.o.weight.shape == (16, 8)
    assert slim.blocks[0].fc1.weight.shape == net.model.blocks[0].fc1.weight.shape
    assert sum(p.numel() for p in slim.parameters()) == net.subnets()[2].params
    assert net.subnets()[2].flops < net.subnets()[1].flops < net.subnets()[0].flops
    assert cocktail.verify_nm(net.slim("heads@0.5+2:4"), 2, 4)
