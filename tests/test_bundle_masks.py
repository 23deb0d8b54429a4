"""A bundle's masks are those that its patterns make, counted exactly; honest ones of every pattern load."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pattern_cases import sparse
from tiny import TinyNet, tiny_net
from torch import nn

import cocktailsdk as cocktail
from cocktailsdk import NM, Block, BundleError, Channel, Depth, Heads, Mask, Product, Transposable, Unstructured, Vector
from cocktailsdk.api import CocktailNet
from cocktailsdk.bundle import write
from cocktailsdk.bundle.write import check_masks
from cocktailsdk.patterns import make_all_masks, parse_pattern, resolve_patterns
from cocktailsdk.training.rivals.alternating import regrown

LEVELS = st.lists(st.floats(0, 1), min_size=1, max_size=3, unique_by=lambda s: round(s, 3)).map(sorted)


def pairs(most):
    return st.integers(2, most).flatmap(lambda m: st.tuples(st.integers(1, m - 1), st.just(m)))


def element_patterns():
    return st.one_of(
        LEVELS.map(Unstructured),
        pairs(9).map(lambda p: NM(*p)),
        pairs(4).map(lambda p: Transposable(*p)),
        st.builds(
            Block,
            st.sampled_from([(1, 2), (2, 2), (4, 3), (5, 1), (64, 64)]),
            LEVELS,
            scope=st.sampled_from(["global", "layer"]),
        ),
        st.builds(Vector, st.sampled_from([2, 3, 8]), LEVELS, scope=st.sampled_from(["global", "layer"])),
    )


def unit_patterns():
    return st.one_of(
        st.builds(Channel, LEVELS, round_to=st.sampled_from([None, "auto", 1, 2, 3, 8, 1000])), LEVELS.map(Heads)
    )


def all_patterns():
    single = st.one_of(element_patterns(), unit_patterns(), LEVELS.map(Depth))
    product = st.tuples(unit_patterns(), element_patterns()).map(lambda pair: Product([pair]))
    return st.one_of(single, product)


@functools.cache
def traced(name):
    return sparse(name, ["2:4"])


def quick(name, patterns):
    """As ``sparse``, without another look at the model."""
    like = traced(name)
    chosen = resolve_patterns(patterns)
    net = CocktailNet(copy.deepcopy(like.model), chosen, like.coupling, like.selection, like.example, {})
    for subnet, mask in make_all_masks(chosen, net.coupling, net.eligible, net.umg().values).items():
        net.set_mask(subnet, mask)
    return net


@settings(max_examples=50)
@given(st.sampled_from(["convolutions", "transformer"]), st.lists(all_patterns(), min_size=1, max_size=3), st.data())
def test_honest_bundles_of_every_pattern_load(tmp_path_factory, name, patterns, data):
    unique = list({p.name: p for p in patterns if not (name == "convolutions" and "heads" in repr(p).lower())}.values())
    if not unique:
        return
    net = quick(name, unique)
    for of in data.draw(
        st.lists(st.sampled_from(net.names[1:]), max_size=2)
    ):  # AC/DC makes masks without the level before
        if "+" not in of:
            net.set_mask(of, net.make_masks(of))
    path = tmp_path_factory.mktemp("honest") / "bundle"
    net.save_pretrained(path)
    loaded = cocktail.from_pretrained(path, type(net.model)())
    assert loaded.subnets() == net.subnets()


@pytest.mark.parametrize("name", ["unstructured@0.7", "2:4", "1:3"])
@pytest.mark.parametrize("share", [0.3, 1.0])
def test_regrown_masks_load(tmp_path, name, share):
    net = quick("convolutions", [Unstructured([0.2, 0.7]), NM(pairs=[(2, 4), (1, 3)])])
    for parameter in net.model.parameters():
        parameter.grad = torch.randn_like(parameter)
    net.set_mask(name, regrown(net, name, share))
    net.save_pretrained(tmp_path / "bundle")
    assert cocktail.from_pretrained(tmp_path / "bundle", type(net.model)()).subnets() == net.subnets()


def lied(net, name, change):
    """The net with another mask of a name, and no check of it when it is saved."""
    mask = net.masks[name]
    elements = {k: v.clone() for k, v in mask.elements.items()}
    removed = None if mask.removed is None else mask.removed.clone()
    other = change(elements, removed)
    net.set_mask(name, other if isinstance(other, Mask) else Mask(elements, removed))
    return net


def flip(where):
    """Mask one element more, or one less, of some tensor."""

    def change(elements, removed):
        for keep in elements.values():
            flat = keep.view(-1)
            found = (flat if where else ~flat).nonzero()[:, 0]
            if len(found):
                flat[found[len(found) // 2]] = not where
                return

    return change


def flip_unit(where):
    def change(elements, removed):
        removed[(removed if where else ~removed).nonzero()[0]] = not where

    return change


def move_unit(elements, removed):
    """As many units as before, in other groups."""
    removed[removed.nonzero()[0]] = False
    removed[(~removed).nonzero()[-1]] = True


def keep_all(elements, removed):
    return Mask({k: torch.ones_like(v) for k, v in elements.items()}, removed)


def move(elements, removed):
    """As many elements as before, elsewhere: one row gives what another takes."""
    keep = next(v for v in elements.values() if v.any() and not v.all()).view(-1)
    keep[keep.nonzero()[0]] = False
    keep[(~keep).nonzero()[-1]] = True


def masks_more(elements, removed):
    """A tensor that no pattern may touch."""
    return Mask({**elements, "fc.bias": torch.zeros(5, dtype=torch.bool)}, removed)


def nothing(elements, removed):
    return Mask({}, None if removed is None else torch.zeros_like(removed))


ELEMENTS = (flip(True), flip(False), keep_all, masks_more)
LIES = [
    *[("convolutions", "unstructured@0.5", lie) for lie in ELEMENTS],
    *[("convolutions", "2:4", lie) for lie in (*ELEMENTS, move, nothing)],
    *[("convolutions", "1:3", lie) for lie in ELEMENTS],
    *[("convolutions", "transposable2:4", lie) for lie in (*ELEMENTS, move, nothing)],
    *[("convolutions", "block2x2@0.5", lie) for lie in (*ELEMENTS, move, nothing)],
    *[("transformer", "vector4@0.3", lie) for lie in ELEMENTS],
    *[
        ("convolutions", "channel@0.5", lie)
        for lie in (flip_unit(True), flip_unit(False), move_unit, masks_more, nothing)
    ],
    *[("transformer", "heads@0.5", lie) for lie in (flip_unit(True), flip_unit(False), move_unit, nothing)],
    *[("transformer", "depth@0.5", lie) for lie in (flip(False), masks_more, nothing)],
    *[("convolutions", "channel@0.5+2:4", lie) for lie in (*ELEMENTS, flip_unit(True), flip_unit(False), nothing)],
    *[("convolutions", "channel@0.4+unstructured@0.5", lie) for lie in (keep_all, flip_unit(False), masks_more)],
    *[("transformer", "heads@0.5+block2x2@0.5", lie) for lie in (*ELEMENTS, flip_unit(False))],
]


@pytest.mark.parametrize(("model", "name", "lie"), LIES)
def test_a_mask_that_its_pattern_does_not_make_is_refused_by_name(tmp_path, monkeypatch, model, name, lie):
    net = lied(quick(model, [name, "unstructured@0.25"]), name, lie)
    path = tmp_path / "bundle"
    with pytest.raises(BundleError) as error:
        net.save_pretrained(path)
    assert repr(name) in str(error.value)
    assert not path.exists()
    monkeypatch.setattr(write, "check_masks", lambda *_: None)
    net.save_pretrained(path)
    made = type(net.model)()
    before = copy.deepcopy(made.state_dict())
    with pytest.raises(BundleError, match="not one that its pattern makes") as error:
        cocktail.from_pretrained(path, made)
    assert repr(name) in str(error.value)
    assert "\n" not in str(error.value)
    assert all(torch.equal(t, before[n]) for n, t in made.state_dict().items())
    cocktail.from_pretrained(path, made, subnets=["unstructured@0.25"])  # of which nothing is wrong


class InGroups(nn.Module):
    """Of a grouped convolution no slice can hold what channels leave, where groups lose other inputs."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(12, 12), nn.Linear(12, 3)
        self.grouped = nn.Conv1d(12, 12, 1, groups=2)

    def forward(self, x):
        return self.last(self.grouped(self.first(x).unsqueeze(-1)).squeeze(-1).relu())


@pytest.mark.parametrize("second", ["2:4", "unstructured@0.5", "block2x2@0.5", "transposable1:2", "vector2@0.5"])
@pytest.mark.parametrize("seed", range(3))
def test_products_load_where_channels_cannot_be_sliced_away(tmp_path, second, seed):
    torch.manual_seed(seed)
    net = cocktail.sparsify(InGroups(), [f"channel@0.3+{second}"], (torch.randn(2, 12),))
    net.save_pretrained(tmp_path / "bundle")
    loaded = cocktail.from_pretrained(tmp_path / "bundle", InGroups())
    assert loaded.subnets() == net.subnets()


@pytest.mark.parametrize(
    ("patterns", "name"),
    [
        ([Unstructured(rounds=4)], "unstructured@0.59"),
        ([Channel(rounds=4, rate=0.23, round_to=1)], "channel@0.648"),
        ([NM(pairs=[(1, 2), (2, 4)])], "1:2"),
        ([Product([(Channel(rounds=2, rate=0.37, round_to=2), Unstructured(rounds=3, rate=0.29))])], None),
    ],
)
def test_one_subnetwork_alone_has_exactly_the_sparsity_that_it_had(patterns, name):
    net = tiny_net(patterns)
    name = name or net.names[-1]
    pattern = net.pattern(net.subnet(name).pattern)
    alone = pattern.alone(name)
    assert [(s.name, s.sparsity) for s in alone.subnets()] == [(name, net.subnet(name).sparsity)]
    alone.check(alone.subnets()[0], net.masks[name], net.umg())


def test_a_users_pattern_with_another_sparsity_than_it_says_is_warned_about_and_loads(tmp_path, caplog, monkeypatch):
    from cocktailsdk.patterns import registry

    monkeypatch.setattr(registry, "_REGISTERED", dict(registry._REGISTERED))

    @cocktail.register_pattern("lazy")
    class Lazy(cocktail.Pattern):
        def subnets(self):
            return (cocktail.Subnet("lazy", "lazy", 0.5),)

        def mask(self, subnet, umg):
            return Mask({w.name: torch.ones(w.shape, dtype=torch.bool) for w in umg.eligible})

        def config(self):
            return {}

    tiny_net([Lazy()]).save_pretrained(tmp_path / "bundle")
    caplog.clear()
    assert cocktail.from_pretrained(tmp_path / "bundle", TinyNet()).names == ["dense", "lazy"]
    assert "the mask of 'lazy' has a sparsity of 0.000, and its pattern asks for 0.500" in caplog.text


def test_masks_load_that_release_0_1_0_fine_tuned_under_a_rounded_level():
    net = tiny_net([Unstructured()])
    name = "unstructured@0.672"  # exactly 0.67232, so one more of 1,408 weights goes
    rounded, mask = parse_pattern(name), net.masks[name]
    with pytest.raises(cocktail.PatternError):
        rounded.check(rounded.subnets()[0], mask, net.umg())
    check_masks([rounded], {name: mask}, net.umg(), "")
    one_more = {n: keep.clone() for n, keep in mask.elements.items()}
    next(keep for keep in one_more.values() if not keep.all()).fill_(True)
    with pytest.raises(BundleError, match=name):
        check_masks([rounded], {name: Mask(one_more)}, net.umg(), "")
