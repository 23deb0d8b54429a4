"""Unstructured masks: exact counts, ties by position, nested over rounds."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_net

from cocktailsdk import PatternError, Unstructured
from cocktailsdk.patterns.ranking import drop_smallest

# Few distinct magnitudes, so that most examples are full of ties; signs and zeros included.
MAGNITUDES = st.sampled_from([0.0, -0.0, 0.5, -0.5, 1.0, -1.0, 1.0000001, 2.0**-149, -3.0, float("inf")])
TENSORS = st.lists(st.lists(MAGNITUDES, min_size=1, max_size=12), min_size=1, max_size=4)
DTYPES = st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16])


@given(TENSORS, DTYPES, st.data())
def test_what_goes_is_what_a_stable_sort_would_take(rows, dtype, data):
    values = {f"w{i}": torch.tensor(r, dtype=dtype) for i, r in enumerate(rows)}
    keep = {
        n: torch.tensor(data.draw(st.lists(st.booleans(), min_size=len(v), max_size=len(v)))) for n, v in values.items()
    }
    flat, kept = torch.cat(list(values.values())).double().abs(), torch.cat(list(keep.values()))
    count = data.draw(st.integers(0, int(kept.sum())))
    order = [i for i in flat.argsort(stable=True).tolist() if kept[i]]
    expected = kept.clone()
    expected[order[:count]] = False

    left = drop_smallest(values, keep, count)

    assert torch.equal(torch.cat(list(left.values())), expected)


@given(st.floats(0.0, 1.0), st.booleans())
def test_exactly_the_asked_count_is_zero(sparsity, ties):
    net = tiny_net([Unstructured([sparsity])])
    if ties:
        with torch.no_grad():
            for w in net.eligible:
                net.model.get_parameter(w.name).fill_(-0.25)
        net.set_mask(net.names[1], net.make_masks(net.names[1]))
    total = sum(w.numel for w in net.eligible)
    zeros = sum(int((~m).sum()) for m in net.masks[net.names[1]].elements.values())
    assert zeros == round(sparsity * total)


def test_ties_go_by_position_in_order_of_execution():
    net = tiny_net([Unstructured([0.25])])
    with torch.no_grad():
        for w in net.eligible:
            net.model.get_parameter(w.name).fill_(1.0)
    mask = net.make_masks("unstructured@0.25")
    flat = torch.cat([mask.elements[w.name].reshape(-1) for w in net.eligible])
    gone = round(0.25 * flat.numel())
    assert not flat[:gone].any()
    assert flat[gone:].all()


@given(st.lists(st.floats(0.01, 0.99), min_size=2, max_size=6, unique_by=lambda s: round(s, 3)), st.integers(0, 3))
def test_masks_are_nested_even_when_weights_change_between_rounds(sparsities, seed):
    net = tiny_net([Unstructured(sorted(sparsities))])
    generator = torch.Generator().manual_seed(seed)
    previous = None
    for s in net.patterns[0].subnets():
        mask = net.make_masks(s, previous)
        if previous is not None:
            assert all(not (m & ~previous.elements[n]).any() for n, m in mask.elements.items())
        previous = mask
        with torch.no_grad():
            for w in net.eligible:
                p = net.model.get_parameter(w.name)
                p.copy_(torch.randn(p.shape, generator=generator))


def test_default_levels_are_those_of_the_paper():
    names = [s.name.partition("@")[2] for s in Unstructured().subnets()]
    assert names == ["0.2", "0.36", "0.488", "0.59", "0.672", "0.738", "0.79", "0.832", "0.866", "0.893"]


def test_half_precision_weights_rank_as_their_float32_values():
    net = tiny_net("unstructured")
    exact = {n: net.make_masks(n) for n in net.names[1:2]}
    net.model.to(torch.bfloat16).to(torch.float32)  # values rounded, so ties are likely
    rounded = net.make_masks("unstructured@0.2")
    net.model.to(torch.bfloat16)
    assert all(torch.equal(m, rounded.elements[n]) for n, m in net.make_masks("unstructured@0.2").elements.items())
    assert exact["unstructured@0.2"].elements.keys() == rounded.elements.keys()


@pytest.mark.parametrize(
    "arguments",
    [
        {"sparsities": [1.5]},
        {"sparsities": [-0.1]},
        {"sparsities": [float("nan")]},
        {"sparsities": []},
        {"sparsities": [0.5, 0.2]},
        {"sparsities": [0.5, 0.5]},
        {"sparsities": [0.5, 0.5001]},
        {"sparsities": ["half"]},
        {"sparsities": "0.5"},
        {"rounds": 0},
        {"rounds": 2.5},
        {"rate": 0.0},
        {"rate": 1.0},
        {"rate": "a"},
    ],
)
def test_bad_arguments_are_refused(arguments):
    with pytest.raises(PatternError, match="unstructured"):
        Unstructured(**arguments)
