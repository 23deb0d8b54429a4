"""Blocks and vectors: exact counts, nested, whole blocks or nothing, remainders whole; through bundles by block."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pattern_cases import assert_whole_way, entry, sparse, weights
from tiny import tiny_net

from cocktailsdk import Block, PatternError, Unstructured, Vector
from cocktailsdk.masks.tiles import covered_by_tiles, matrices, tiles, unmatrices, untiles
from cocktailsdk.patterns import in_order, parse_pattern, resolve_patterns
from cocktailsdk.patterns.channel import Channel
from cocktailsdk.patterns.unit_scores import unit_scores

SIZES = st.sampled_from([(4, 4), (2, 3), (1, 4), (4, 1), (16, 16)])


def matrix_entries(weight):
    """For each matrix of a weight its elements' places, row by row, found without the code under test."""
    outputs = weight.shape[weight.out_axis] // (weight.groups if weight.op == "conv" else 1)
    inputs = weight.shape[weight.in_axis] // (weight.groups if weight.op == "conv_transpose" else 1)
    others = [range(n) for d, n in enumerate(weight.shape) if d not in (weight.out_axis, weight.in_axis)]
    for group in range(weight.groups):
        for position in itertools.product(*others):
            yield [[entry(weight, group, position, r, c) for c in range(inputs)] for r in range(outputs)]


@given(weights())
def test_a_matrix_holds_the_outputs_by_inputs_of_one_kernel_position_of_one_group(made):
    weight, _ = made
    value = torch.arange(weight.numel).reshape(weight.shape)
    found = matrices(weight, value)
    want = [[[int(value[at]) for at in row] for row in matrix] for matrix in matrix_entries(weight)]
    assert found.tolist() == want
    assert torch.equal(unmatrices(weight, found), value)


@given(weights(), SIZES)
def test_tiles_and_back_is_the_identity_but_for_remainders(made, size):
    weight, _ = made
    value = torch.arange(weight.numel).reshape(weight.shape)
    again = untiles(weight, tiles(weight, value, *size), -1)
    assert again.shape == value.shape
    assert torch.equal(again[again >= 0], value[again >= 0])
    assert int((again >= 0).sum()) == covered_by_tiles(weight, *size)


@settings(max_examples=30)
@given(SIZES, st.floats(0.0, 1.0), st.sampled_from(["global", "layer"]), st.booleans())
def test_exactly_the_asked_count_of_whole_blocks_goes_and_remainders_stay(size, sparsity, scope, ties):
    net = tiny_net([Block(size, [sparsity], scope=scope)])
    name = net.names[1]
    if ties:
        with torch.no_grad():
            for p in net.model.parameters():
                p.fill_(0.5)
        net.set_mask(name, net.make_masks(name))
    mask = net.masks[name]
    gone, blocks = {}, {}
    for w in net.eligible:
        keep = mask.elements[w.name]
        cells = tiles(w, keep, *size)
        assert bool((cells.all(-1).all(-1) | ~cells.any(-1).any(-1)).all())
        assert int((~keep).sum()) == int((~cells).sum())  # nothing outside of full blocks
        gone[w.name], blocks[w.name] = int((~cells[:, 0, 0]).sum()), cells.shape[0]
    if scope == "global":
        assert sum(gone.values()) == round(sparsity * sum(blocks.values()))
    else:
        assert gone == {n: round(sparsity * count) for n, count in blocks.items()}
    report = net.subnets()[1]
    covered = sum(blocks.values()) * math.prod(size)
    assert report.sparsity_exact == pytest.approx(sum(gone.values()) * math.prod(size) / covered if covered else 0.0)
    assert report.coverage == pytest.approx(covered / sum(w.numel for w in net.eligible))


def test_the_blocks_of_least_norm_go():
    net = tiny_net([Block(sparsities=[0.5])])
    norms, keep = [], []
    for w in net.eligible:
        value = net.model.get_parameter(w.name).detach()
        for matrix in matrix_entries(w):
            rows, columns = len(matrix) // 4 * 4, len(matrix[0]) // 4 * 4
            for r, c in itertools.product(range(0, rows, 4), range(0, columns, 4)):
                places = [matrix[r + i][c + j] for i in range(4) for j in range(4)]
                norms.append(sum(abs(float(value[at])) for at in places))
                keep.append(bool(net.masks["block4x4@0.5"].elements[w.name][places[0]]))
    order = sorted(range(len(norms)), key=norms.__getitem__)
    assert not any(keep[i] for i in order[: len(norms) // 2])
    assert all(keep[i] for i in order[len(norms) // 2 :])


@settings(max_examples=10)
@given(st.integers(0, 5), st.sampled_from([Block(), Vector(), Block((2, 3), scope="layer")]))
def test_levels_are_nested_even_when_weights_change_between_rounds(seed, pattern):
    net = tiny_net([pattern])
    generator = torch.Generator().manual_seed(seed)
    previous = None
    for s in pattern.subnets():
        mask = net.make_masks(s, previous)
        if previous is not None:
            assert not any(bool((k & ~previous.elements[n]).any()) for n, k in mask.elements.items())
        previous = mask
        with torch.no_grad():
            for p in net.model.parameters():
                p.copy_(torch.randn(p.shape, generator=generator))


@pytest.mark.parametrize(
    ("spec", "pattern"),
    [
        ("block", Block()),
        ("block@0.5", Block(sparsities=[0.5])),
        ("block4x4@0.5", Block(sparsities=[0.5])),
        ("block16x8", Block((16, 8))),
        ("vector", Vector()),
        ("vector8@0.75", Vector(8, [0.75])),
    ],
)
def test_strings_say_the_size(spec, pattern):
    assert parse_pattern(spec) == pattern
    assert type(pattern)(**pattern.config()) == pattern


def test_levels_of_one_size_merge_and_other_sizes_are_refused():
    assert resolve_patterns(["block@0.5", "block4x4@0.3"]) == (Block(sparsities=[0.3, 0.5]),)
    assert [s.name for s in Vector(8, [0.3, 0.5]).subnets()] == ["vector8@0.3", "vector8@0.5"]
    with pytest.raises(PatternError, match="one size"):
        resolve_patterns(["block4x4@0.5", "block8x8@0.5"])


@pytest.mark.parametrize(
    "make",
    [
        lambda: Block((0, 4)),
        lambda: Block((4,)),
        lambda: Block("44"),
        lambda: Block((1.5, 2)),
        lambda: Block((True, 2)),
        lambda: Block((1, 1)),
        lambda: Block(scope="network"),
        lambda: Block(sparsities=[2.0]),
        lambda: Vector(0),
        lambda: Vector("x"),
        lambda: parse_pattern("block4x4@half"),
        lambda: parse_pattern("block4x"),
        lambda: parse_pattern("vector0@0.5"),
    ],
)
def test_bad_arguments_are_refused(make):
    with pytest.raises(PatternError):
        make()


def test_a_block_mask_enters_the_channel_score_as_the_unstructured_one_does():
    net = tiny_net(["unstructured@0.5", "block@0.5", "channel@0.5"])
    block, free = net.masks["block4x4@0.5"], net.masks["unstructured@0.5"]
    alone = unit_scores(net.umg(made={"block": block}), 0.8)
    assert torch.equal(alone, unit_scores(net.umg(made={"unstructured": block}), 0.8))
    both = unit_scores(net.umg(made={"unstructured": free, "block": block}), 1.0)
    assert not torch.equal(both, unit_scores(net.umg(made={"unstructured": free}), 1.0))
    assert [p.name for p in in_order([Channel(), Block(), Unstructured()])] == ["block", "unstructured", "channel"]


@pytest.mark.parametrize("model", ["convolutions", "transformer"])
def test_blocks_go_the_whole_way_and_are_stored_by_block(model, tmp_path):
    net = sparse(model, ["block2x4@0.3", "block2x4@0.6", "vector4@0.5", "channel@0.25"])
    assert_whole_way(net, tmp_path / "bundle")
    masks = json.loads((tmp_path / "bundle" / "bundle.json").read_text())["masks"]
    assert [e.get("block") for e in masks] == [[2, 4], [1, 4], None]
    sizes = {e["tensor"]: e for e in masks}
    from safetensors import safe_open

    with safe_open(tmp_path / "bundle" / "subnets.safetensors", "pt") as file:
        blocks = sum(covered_by_tiles(w, 2, 4) // 8 for w in net.eligible)
        assert file.get_tensor("block.elements").numel() == (2 * blocks + 7) // 8  # two bits a block
        assert set(sizes) <= set(file.keys())
