"""Channel masks: the paper's score, exact counts in every group, never all, nested."""

from __future__ import annotations

import json
import math

import pytest
import torch
from block_models import block_model
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_net

import cocktailsdk as cocktail
from cocktailsdk import NM, Channel, Mask, PatternError
from cocktailsdk.graph import Group, couple
from cocktailsdk.patterns import make_pattern, parse_pattern
from cocktailsdk.patterns.unit_choice import kept_units
from cocktailsdk.patterns.unit_groups import stream_groups
from cocktailsdk.patterns.unit_scores import unit_scores


def naive_scores(net, beta, made):
    """β‖m_u ⊙ C‖₁ + (1-β)‖m_nm ⊙ C‖₁ for every row C, over the mean of its layer, summed over producers."""
    scores = [0.0] * net.coupling.n_units
    eligible = {w.name for w in net.eligible}
    for p in net.coupling.producers:
        weight = net.model.get_parameter(p.weight).detach().double()
        rows = []
        for i in range(weight.shape[p.axis]):
            row = weight.select(p.axis, i).reshape(-1).tolist()
            terms = []
            for name, share in (("unstructured", beta), ("n:m", 1 - beta)):
                if name in made:
                    kept = [True] * len(row)
                    if p.weight in eligible:
                        kept = made[name].elements[p.weight].select(p.axis, i).reshape(-1).tolist()
                    terms.append(share * sum(abs(v) for v, k in zip(row, kept, strict=True) if k))
            rows.append(sum(terms) if terms else sum(abs(v) for v in row))
        mean = sum(rows) / len(rows)
        for i, u in enumerate(p.units.tolist()):
            if u >= 0:
                scores[u] += rows[i] / mean
    return scores


@pytest.mark.parametrize("made_by", [(), ("unstructured",), ("n:m",), ("unstructured", "n:m")])
@pytest.mark.parametrize("beta", [0.8, 0.3])
def test_the_score_is_the_papers_formula(made_by, beta):
    net = tiny_net()
    masks = {"unstructured": net.masks["unstructured@0.738"], "n:m": net.masks["2:4"]}
    made = {n: masks[n] for n in made_by}
    found = unit_scores(net.umg(made=made), beta)
    assert found.tolist() == pytest.approx(naive_scores(net, beta, made), rel=1e-6)


@given(st.floats(0.0, 1.0), st.booleans())
def test_of_every_group_the_asked_share_goes_but_never_all(sparsity, ties):
    net = tiny_net([Channel([sparsity])])
    if ties:
        with torch.no_grad():
            for p in net.model.parameters():
                p.fill_(0.5)
        net.set_mask(net.names[1], net.make_masks(net.names[1]))
    removed = net.masks[net.names[1]].removed
    for g in net.coupling.groups:
        assert int(removed[g.start : g.stop].sum()) == min(round(sparsity * g.size), g.size - 1)
        if ties:  # by position
            assert removed[g.start : g.stop].tolist() == sorted(removed[g.start : g.stop].tolist(), reverse=True)


@given(st.integers(0, 5))
def test_masks_are_nested_even_when_weights_change_between_rounds(seed):
    net = tiny_net([Channel()])
    generator = torch.Generator().manual_seed(seed)
    previous = None
    for s in net.patterns[0].subnets():
        mask = net.make_masks(s, previous)
        if previous is not None:
            assert not (previous.removed & ~mask.removed).any()
        previous = mask
        with torch.no_grad():
            for p in net.model.parameters():
                p.copy_(torch.randn(p.shape, generator=generator))


@given(
    st.integers(1, 600),
    st.sampled_from([1, 2, 3, 8, 64]),
    st.lists(st.floats(0, 1), min_size=2, max_size=2),
    st.sampled_from([1, 4, 8, "auto"]),
)
def test_rounding_keeps_at_least_one_and_is_monotone(size, channels, sparsities, round_to):
    group = Group("g", 0, size, (), (), channels)
    less, more = (kept_units(group, s, round_to) for s in sorted(sparsities))
    assert 1 <= more <= less <= size
    multiple = (8 if size * channels >= 256 else 1) if round_to == "auto" else round_to
    if multiple > 1 and 0 < more < size:
        assert more * channels % math.lcm(multiple, 1) == 0


def test_auto_rounds_only_wide_groups():
    assert kept_units(Group("narrow", 0, 64, (), ()), 0.3, "auto") == 64 - 19
    assert kept_units(Group("wide", 0, 512, (), ()), 0.3, "auto") % 8 == 0
    assert kept_units(Group("wide", 0, 512, (), ()), 0.3, 1) == 512 - 154


def test_the_round_of_training_decides_which_masks_enter_the_score():
    net = tiny_net()
    umg = net.umg(made={"unstructured": net.masks["unstructured@0.2"]})  # round 1 has no N:M network yet
    pattern = net.pattern("channel")
    first = pattern.mask(net.subnet("channel@0.1"), umg)
    assert torch.equal(first.removed, net.masks["channel@0.1"].removed)


@given(
    st.lists(st.floats(0.0, 1.0), min_size=2, max_size=4).map(sorted),
    st.sampled_from([1, 4, "auto"]),
    st.integers(0, 3),
)
def test_ranked_over_all_groups_exactly_the_asked_units_go_nested(sparsities, round_to, seed):
    net = tiny_net([Channel(scope="global")])
    generator = torch.Generator().manual_seed(seed)
    previous = None
    for sparsity in sparsities:
        pattern = Channel([sparsity], scope="global", round_to=round_to)
        (subnet,) = pattern.subnets()
        mask = pattern.mask(subnet, net.umg(previous))
        pattern.check(subnet, mask, net.umg())
        n, groups = net.coupling.n_units, net.coupling.groups
        assert not any(bool(mask.removed[g.start : g.stop].all()) for g in groups)
        if round_to != 4:
            assert int(mask.removed.sum()) == min(round(sparsity * n), n - len(groups))
        if previous is not None:
            assert not (previous.removed & ~mask.removed).any()
        previous = mask
        with torch.no_grad():  # weights change between rounds
            for p in net.model.parameters():
                p.copy_(torch.randn(p.shape, generator=generator))


def test_ranked_over_all_groups_the_choice_is_that_of_slim():
    net = tiny_net([Channel([0.3], scope="global", beta=1.0, round_to=1)])
    assert len({_share(net, g) for g in net.coupling.groups}) > 1
    small = cocktail.slim(net.model, net.example[0], ratio=0.3, scope="global")
    ours = net.slim("channel@0.3")
    assert [p.shape for p in small.parameters()] == [p.shape for p in ours.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(small.parameters(), ours.parameters(), strict=True))


def _share(net, g):
    return float(net.masks["channel@0.3"].removed[g.start : g.stop].float().mean())


def test_a_mask_with_another_number_of_units_is_refused():
    net = tiny_net([Channel([0.3], scope="global", round_to=1)])
    pattern, (subnet,) = net.patterns[0], net.patterns[0].subnets()
    removed = net.masks[subnet.name].removed.clone()
    removed[removed.nonzero()[0]] = False
    with pytest.raises(PatternError, match="units are removed, not"):
        pattern.check(subnet, Mask(removed=removed), net.umg())
    with pytest.raises(PatternError, match="of the group"):
        Channel([0.3]).check(Channel([0.3]).subnets()[0], net.masks[subnet.name], net.umg())


def test_the_scope_is_written_where_it_is_not_the_one_of_before(tmp_path):
    assert "scope" not in Channel().config()
    assert Channel(scope="global").config()["scope"] == "global"
    assert parse_pattern("channel@0.5").scope == "group"
    net = tiny_net([Channel([0.25, 0.5], scope="global")])
    net.save_pretrained(tmp_path)
    loaded = cocktail.from_pretrained(tmp_path, type(net.model)())
    assert loaded.patterns == net.patterns
    assert loaded.patterns[0].alone("channel@0.5") == Channel([0.5], scope="global")


@pytest.mark.parametrize(
    "arguments",
    [
        {"scope": "layer"},
        {"beta": 1.5},
        {"beta": "x"},
        {"round_to": 0},
        {"round_to": "even"},
        {"round_to": 2.0},
        {"sparsities": [2.0]},
    ],
)
def test_bad_arguments_are_refused(arguments):
    with pytest.raises(PatternError, match="channel"):
        Channel(**arguments)


@pytest.mark.parametrize("kind", ["llama", "vit"])
def test_the_stream_of_a_transformer_is_left_unpruned_unless_it_is_included(kind):
    model, args, kwargs = block_model(kind, layers=2)
    net = cocktail.sparsify(model, [Channel([0.5], round_to=1)], args, kwargs)
    (stream,) = stream_groups(net.coupling)
    removed = net.masks["channel@0.5"].removed
    assert stream.size == 16
    assert not bool(removed[stream.start : stream.stop].any())
    assert int(removed.sum()) == sum(round(0.5 * g.size) for g in net.coupling.groups if g != stream)
    report = net.subnets()[1]
    assert report.sparsity_exact == pytest.approx(0.5, abs=0.05)
    assert report.coverage > 0.9  # of what streams hold alone (embeddings, norms) nothing is eligible
    small = net.slim("channel@0.5")
    assert sum(p.numel() for p in small.parameters()) == report.params
    wider = Channel([0.5], include_stream=True, round_to=1).mask(net.subnet("channel@0.5"), net.umg())
    assert int(wider.removed[stream.start : stream.stop].sum()) == 8


def test_the_stream_of_a_resnet_loses_channels_as_before():
    model, args, _ = block_model("resnet")
    net = cocktail.sparsify(model, ["channel@0.5"], args)
    assert stream_groups(net.coupling) == ()
    assert net.patterns[0].groups(net.coupling) == net.coupling.groups
    assert net.subnets()[1].coverage == 1.0


def test_a_model_whose_stream_alone_can_go_is_refused_with_what_to_write():
    model, args, kwargs = block_model("llama", layers=2)
    with pytest.raises(PatternError, match=r"residual stream \('model'\).*write Channel\(include_stream=True\)"):
        cocktail.sparsify(model, ["channel@0.5"], args, kwargs, exclude_modules=["q_proj", "gate_proj"])
    kept = ["q_proj", "gate_proj"]
    net = cocktail.sparsify(model, [Channel([0.5], include_stream=True)], args, kwargs, exclude_modules=kept)
    assert int(net.masks["channel@0.5"].removed.sum()) == 8


def test_a_configuration_of_before_narrows_streams_and_is_written_as_it_was(tmp_path):
    before = {"sparsities": [0.5], "beta": 0.8, "round_to": "auto"}
    pattern = make_pattern("channel", before)
    assert pattern == Channel([0.5], include_stream=True)
    assert pattern.config() == before
    assert repr(pattern) == "Channel(sparsities=[0.5], beta=0.8, round_to='auto', include_stream=True)"
    assert Channel([0.5]).config() == {**before, "include_stream": False}
    assert pattern.alone("channel@0.5") == pattern
    assert pattern.merged(Channel([0.25], include_stream=True)).include_stream
    with pytest.raises(PatternError, match="given twice"):
        pattern.merged(Channel([0.25]))
    pair = [{"name": "channel", "config": before}, {"name": "n:m", "config": NM(2, 4).config()}]
    product = make_pattern("product", {"pairs": [pair]})
    assert product.pairs[0][0] == pattern
    model, args, kwargs = block_model("llama", layers=2)
    net = cocktail.sparsify(model, [pattern], args, kwargs)
    net.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "bundle.json").read_text())["patterns"] == [{"name": "channel", "config": before}]
    loaded = cocktail.from_pretrained(tmp_path, block_model("llama", layers=2)[0])
    assert loaded.patterns == net.patterns
    assert torch.equal(loaded.masks["channel@0.5"].removed, net.masks["channel@0.5"].removed)
    assert loaded.subnets() == net.subnets()


def test_runs_resume_by_what_makes_a_difference_on_their_model():
    net = tiny_net([Channel([0.5])])
    assert Channel([0.5]).config_on(net.coupling) == Channel([0.5], include_stream=True).config()
    model, args, kwargs = block_model("llama", layers=2)
    coupling = couple(model, args, kwargs, prove=False)
    assert Channel([0.5]).config_on(coupling)["include_stream"] is False
