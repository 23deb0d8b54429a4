"""Depth: residual branches go as a whole, exactly the asked share, and slim models lose their modules."""

from __future__ import annotations

import json
import logging

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from pattern_cases import ConvBlock, assert_whole_way, sparse
from torch import nn

import cocktailsdk as cocktail
from cocktailsdk import Depth, PatternError
from cocktailsdk.graph import couple
from cocktailsdk.inspection.measuring import measured_flops
from cocktailsdk.patterns import parse_pattern
from cocktailsdk.patterns.depth import branch_scores
from cocktailsdk.slimming.depth import Skipped


@pytest.fixture(scope="module")
def transformer():
    return sparse("transformer", [Depth([0.25, 0.5, 0.75])])


class Blocks(nn.Module):
    """One block between a first layer and a classifier."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.first, self.block, self.last = nn.Conv2d(3, 8, 1), block, nn.Linear(8, 3)

    def forward(self, x):
        return self.last(self.block(self.first(x)).mean((2, 3)))


class Block(nn.Module):
    """``x + f(x)``, f given by its last steps."""

    def __init__(self, *end: nn.Module, outer: bool = False) -> None:
        super().__init__()
        self.a, self.end, self.outer = nn.Conv2d(8, 8, 3, padding=1), nn.Sequential(*end), outer

    def forward(self, x):
        y = self.end(F.relu(self.a(x)))
        return y if self.outer else x + y


class Parallel(nn.Module):
    """Two branches from one norm, added one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.a, self.b = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)

    def forward(self, x):
        y = self.norm(x)
        return x + self.a(y) + self.b(y)


class Shared(nn.Module):
    """The branch's weight is the stream's, too."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(8, 8, 1)

    def forward(self, x):
        x = self.a(x)
        return x + self.a(x)


class Inner(nn.Module):
    """A branch within a branch."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out = Block(nn.Conv2d(8, 8, 1)), nn.Conv2d(8, 8, 1)

    def forward(self, x):
        return x + self.out(self.inner(x))


def conv():
    return nn.Conv2d(8, 8, 1)


@pytest.mark.parametrize(
    ("block", "found"),
    [
        (lambda: Block(conv()), [("a", "end")]),
        (lambda: Block(conv(), nn.BatchNorm2d(8)), [("a", "end")]),
        (lambda: Block(conv(), nn.ReLU(), nn.Dropout(0.1)), [("a", "end")]),
        (lambda: Block(conv(), nn.GroupNorm(2, 8)), [("a", "end")]),
        (lambda: Block(conv(), nn.BatchNorm2d(8, affine=False)), []),  # what it measured would still be added
        (lambda: Block(conv(), nn.Sigmoid()), []),  # a half of nothing
        (lambda: Block(conv(), outer=True), []),  # nothing is added
        (Parallel, [("a",), ("b",)]),
        (Shared, []),
        (Inner, [("inner.a", "inner.end")]),
        (lambda: ConvBlock(8, 4, 8), [("conv1", "bn1", "conv2", "bn2", "conv3", "bn3")]),
    ],
)
def test_a_branch_is_what_can_be_made_to_add_nothing(block, found):
    model = Blocks(block()).eval()
    coupling = couple(model, (torch.randn(2, 3, 5, 5),), prove=False)
    modules = [tuple(m.removeprefix("block.") for m in b.modules) for b in coupling.branches]
    assert modules == found
    for branch in coupling.branches:  # with random statistics, too
        made = Blocks(block()).eval()
        for m in made.modules():
            if isinstance(m, nn.BatchNorm2d) and m.affine:
                m.running_mean.normal_()
        state = made.state_dict()
        for name in branch.tensors:
            state[name].zero_()
        seen = []
        made.get_submodule(branch.modules[-1]).register_forward_hook(lambda _m, _a, out, seen=seen: seen.append(out))
        made(torch.randn(2, 3, 5, 5))
        assert not bool(seen[0].any())


def test_a_shortcut_with_weights_is_no_stream():
    net = sparse("convolutions", [Depth([0.5])])
    assert [b.name for b in net.coupling.branches] == ["block1", "block3"]
    assert [b.name for b in net.masks["depth@0.5"].dropped(net.coupling)] in (["block1"], ["block3"])


@given(sparsity=st.floats(0.0, 1.0), seed=st.integers(0, 3))
def test_the_asked_share_of_branches_goes_but_never_all(transformer, sparsity, seed):
    pattern, umg = Depth([sparsity]), transformer.umg()
    generator = torch.Generator().manual_seed(seed)
    umg.values.update({n: torch.randn(v.shape, generator=generator) for n, v in umg.values.items()})
    mask = pattern.mask(pattern.subnets()[0], umg)
    dropped = mask.dropped(transformer.coupling)
    assert len(dropped) == min(round(sparsity * 4), 3)
    assert set(mask.elements) == {t for b in dropped for t in b.tensors}
    assert pattern.exact_sparsity(pattern.subnets()[0], mask, umg) == len(dropped) / 4


def test_the_branches_of_least_score_go_and_levels_are_nested(transformer):
    branches = transformer.coupling.branches
    scores = branch_scores(transformer.umg(), branches, 0.8)
    order = [branches[i].name for i in sorted(range(4), key=scores.__getitem__)]
    for k, name in enumerate(transformer.names[1:], 1):
        assert {b.name for b in transformer.masks[name].dropped(transformer.coupling)} == set(order[:k])
    with torch.no_grad():
        previous = transformer.masks["depth@0.5"]
        values = {n: torch.rand_like(v) for n, v in transformer.umg().values.items()}
    umg = cocktail.UMG(transformer.coupling, transformer.eligible, values, previous)
    mask = transformer.patterns[0].mask(transformer.subnet("depth@0.75"), umg)
    assert set(previous.elements) < set(mask.elements)


def test_the_score_does_not_depend_on_the_width():
    scores = []
    for width in (8, 64):
        torch.manual_seed(0)
        block = nn.Sequential(nn.Linear(12, width), nn.Linear(width, 12))

        class Net(nn.Module):
            def __init__(self, block=block):
                super().__init__()
                self.first, self.block, self.last = nn.Linear(12, 12), block, nn.Linear(12, 3)

            def forward(self, x):
                x = self.first(x)
                return self.last(x + self.block(x))

        net = cocktail.sparsify(Net(), ["unstructured@0.5"], example_inputs=(torch.randn(2, 12),))
        scores += branch_scores(net.umg(), net.coupling.branches, 0.8)
    assert scores[0] == pytest.approx(scores[1], rel=0.15)


def test_what_the_user_excludes_stays():
    model = sparse("transformer", ["unstructured@0.5"]).model
    net = cocktail.sparsify(model, [Depth([0.5])], (torch.randn(2, 5, 12),), exclude_modules=["fc2"])
    assert {b.name for b in net.masks["depth@0.5"].dropped(net.coupling)} <= {"blocks.0.attn", "blocks.1.attn"}
    assert net.subnets()[1].sparsity_exact == 0.5
    with pytest.raises(PatternError, match="no residual branch"):
        cocktail.sparsify(model, [Depth([0.5])], (torch.randn(2, 5, 12),), exclude_modules=["fc2", "o"])


def test_strings_and_arguments():
    assert parse_pattern("depth@0.25") == Depth([0.25])
    assert Depth(**Depth([0.5], beta=0.3).config()) == Depth([0.5], beta=0.3)
    for bad in ({"beta": "x"}, {"sparsities": [1.5]}, {"rate": 1.0}):
        with pytest.raises(PatternError, match="depth"):
            Depth(**bad)
    with pytest.raises(PatternError, match="no eligible weight"):
        sparse("transformer", ["channel@0.5+depth@0.5"])


@pytest.mark.parametrize("model", ["convolutions", "transformer"])
def test_depth_goes_the_whole_way_and_only_names_are_stored(model, tmp_path):
    net = sparse(model, ["depth@0.1", "depth@0.5", "channel@0.25"])  # of so few, a tenth is none
    loaded = assert_whole_way(net, tmp_path / "bundle")
    assert loaded.coupling.branches == net.coupling.branches
    entries = json.loads((tmp_path / "bundle" / "bundle.json").read_text())["masks"]
    assert [e["zeroed"] for e in entries if "zeroed" in e] == ["depth@0.5"]
    assert not any("tensor" in e for e in entries if "zeroed" in e)


@pytest.mark.parametrize("model", ["convolutions", "transformer"])
def test_the_slim_model_holds_and_runs_what_the_report_says(model):
    net = sparse(model, ["depth@0.5"])
    report, slim = net.subnets()[1], net.slim("depth@0.5")
    assert sum(p.numel() for p in slim.parameters()) == report.params
    assert measured_flops(slim, net.example[0])[""] == report.flops < net.subnets()[0].flops
    assert report.nonzero_macs == report.flops // 2
    gone = [m for b in net.masks["depth@0.5"].dropped(net.coupling) for m in b.modules]
    assert all(isinstance(slim.get_submodule(path), Skipped) for path in gone)
    slim.train()
    (x,) = net.example[0]
    assert slim(torch.cat([x, x])).shape[0] == 2 * x.shape[0]
    assert net.model.training is False


class TwoAtOnce(nn.Module):
    """One branch, two sums: a norm's two readers are added before the stream is."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.a, self.b, self.last = (
            nn.Linear(8, 8),
            nn.LayerNorm(8),
            nn.Linear(8, 8),
            nn.Linear(8, 8),
            nn.Linear(8, 8),
        )
        self.first2, self.c = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        x = self.first2(self.first(x))
        y = self.norm(x)
        x = self.a(y) + self.b(y) + x
        return self.last(x + self.c(x).relu())


def test_a_branch_of_several_terms_goes_as_one():
    net = cocktail.sparsify(TwoAtOnce().eval(), [Depth([0.5])], (torch.randn(2, 8),))
    assert [b.modules for b in net.coupling.branches] == [("norm", "a", "b"), ("c",)]
    tensors = net.coupling.branches[0].tensors
    shapes = net.coupling.shapes
    net.set_mask("depth@0.5", cocktail.Mask({t: torch.zeros(shapes[t], dtype=torch.bool) for t in tensors}))
    slim = net.slim("depth@0.5")
    assert all(isinstance(slim.get_submodule(path), Skipped) for path in ("norm", "a", "b"))
    x = torch.randn(5, 8)
    with net.using("depth@0.5"), torch.no_grad():
        assert torch.equal(slim(x), net(x))


class ReadsItsParts(nn.Module):
    """Code that wants more of a module than to call it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.a, self.b, self.last = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x):
        x = self.first(x)
        return self.last(x + self.b(self.a(x).relu()[..., : self.a.out_features]))


def test_where_code_reads_more_of_a_module_the_branch_stays_masked(caplog):
    model = ReadsItsParts().eval()
    x = torch.randn(2, 8)
    net = cocktail.sparsify(model, [Depth([0.9]), "unstructured@0.5"], (x,))
    net.set_mask(
        "depth@0.9",
        cocktail.Mask(
            {t: torch.zeros(net.coupling.shapes[t], dtype=torch.bool) for t in net.coupling.branches[0].tensors}
        ),
    )
    with caplog.at_level(logging.WARNING, logger="cocktailsdk"):
        slim = net.slim("depth@0.9")
    assert "stay in the slim model" in caplog.text
    assert isinstance(slim.a, nn.Linear)
    with net.using("depth@0.9"), torch.no_grad():
        assert torch.equal(slim(x), net(x))
