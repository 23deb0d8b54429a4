"""The options of the one-liner: ratios by module and group, minimum widths, the global scope, importances."""

from __future__ import annotations

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import cocktailsdk as cocktail
from cocktailsdk import PatternError
from cocktailsdk.graph import couple
from cocktailsdk.graph.compare import relative_error, tensors_in
from cocktailsdk.graph.coupling import Coupling, Group, Producer
from cocktailsdk.patterns.unit_choice import Choice, Pool
from cocktailsdk.slimming.choice import scores_of
from cocktailsdk.slimming.ratios import pools
from cocktailsdk.slimming.targets import Target

X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    def __init__(self, width, inner):
        super().__init__()
        self.conv1 = nn.Conv2d(width, inner, 3, padding=1)
        self.conv2 = nn.Conv2d(inner, width, 3, padding=1)

    def forward(self, x):
        return x + self.conv2(torch.relu(self.conv1(x)))


class Net(nn.Module):
    """Groups: ``stream`` (stem and both conv2), ``layer1.0.conv1``, ``layer1.1.conv1``, ``neck``."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.layer1 = nn.Sequential(Block(16, 8), Block(16, 24))
        self.neck = nn.Conv2d(16, 32, 1)
        self.head = nn.Linear(32, 5)

    def forward(self, x):
        x = torch.relu(self.neck(self.layer1(torch.relu(self.stem(x)))))
        return self.head(x.mean((2, 3)))


SIZES = {"stream": 16, "layer1.0.conv1": 8, "layer1.1.conv1": 24, "neck": 32}


class Attention(nn.Module):
    """Heads of four channels: a unit of attention is a head."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(10, 32) for _ in range(3))
        self.out = nn.Linear(32, 6)

    def forward(self, x):
        q, k, v = (m(x).view(*x.shape[:2], -1, 4).transpose(1, 2) for m in (self.q, self.k, self.v))
        y = torch.softmax(q @ k.transpose(-1, -2) / 2.0, -1) @ v
        return self.out(y.transpose(1, 2).flatten(2))


def net(seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Net().eval()


def widths(slim):
    return {
        "stream": slim.stem.out_channels,
        "layer1.0.conv1": slim.layer1[0].conv1.out_channels,
        "layer1.1.conv1": slim.layer1[1].conv1.out_channels,
        "neck": slim.neck.out_channels,
    }


def slimmed(**options):
    return widths(cocktail.slim(net(), (X,), **options))


@pytest.fixture(scope="module")
def coupling():
    found = couple(net(), (X,))
    assert {g.name: g.size for g in found.groups} == SIZES
    return found


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def ratios(coupling, by_key, scope="group"):
    """Every group's ratio."""
    return {g.name: p.ratio for p in pools(by_key, scope, net(), coupling) for g in p.groups}


class TestRatios:
    @pytest.mark.parametrize("everywhere", [{"*": 0.5}, dict.fromkeys(SIZES, 0.5), {r".*conv\d": 0.5, "*": 0.5}])
    def test_the_same_ratio_everywhere_is_that_ratio(self, everywhere):
        assert same(cocktail.slim(net(), (X,), ratio=everywhere), cocktail.slim(net(), (X,), ratio=0.5))

    @pytest.mark.parametrize(
        ("by_key", "expected"),
        [
            ({"neck": 0.5}, {"neck": 16}),
            ({"stream": 0.25}, {"stream": 12}),
            ({"conv1": 0.5}, {"layer1.0.conv1": 4, "layer1.1.conv1": 12}),
            ({"neck.weight": 0.75}, {"neck": 8}),
            ({"layer1.0.conv2": 0.5}, {"stream": 8}),
            ({"layer1": 0.5}, {"layer1.0.conv1": 4, "layer1.1.conv1": 12}),
            ({r"layer1\.\d\.conv\d": 0.5}, {"layer1.0.conv1": 4, "layer1.1.conv1": 12}),
            ({"1": 0.5}, {"layer1.1.conv1": 12}),
        ],
    )
    def test_a_key_claims_what_it_makes_and_the_rest_stays_whole(self, by_key, expected):
        assert slimmed(ratio=by_key) == {**SIZES, **expected}

    @pytest.mark.parametrize(
        ("general", "specific", "group"),
        [
            ("*", r"ne.k", "neck"),
            (r"layer.*", "layer1", "layer1.0.conv1"),
            ("layer1", "layer1.0", "layer1.0.conv1"),
            ("layer1", "0", "layer1.0.conv1"),
            ("0", "layer1.0", "layer1.0.conv1"),
            ("layer1.0", "conv1", "layer1.0.conv1"),
            ("conv1", "0.conv1", "layer1.0.conv1"),
            ("0.conv1", "layer1.0.conv1", "layer1.0.conv1"),
            ("conv2", "layer1.0.conv2", "stream"),
            ("layer1.0.conv2", "stream", "stream"),
        ],
    )
    def test_the_most_specific_key_wins_in_any_order(self, coupling, general, specific, group):
        for by_key in ({general: 0.25, specific: 0.5}, {specific: 0.5, general: 0.25}):
            assert ratios(coupling, by_key)[group] == 0.5

    def test_a_less_specific_key_may_be_left_with_nothing(self, coupling):
        assert ratios(coupling, {"layer1.0": 0.25, "conv1": 0.5}) == {"layer1.0.conv1": 0.5, "layer1.1.conv1": 0.5}

    def test_names_that_share_a_weight_all_find_it(self):
        class Tied(nn.Module):
            def __init__(self):
                super().__init__()
                self.first = nn.Linear(4, 6)
                self.a = nn.Linear(6, 6)
                self.b = self.a
                self.out = nn.Linear(6, 2)

            def forward(self, x):
                return self.out(torch.relu(self.b(torch.relu(self.a(self.first(x))))))

        small = cocktail.slim(Tied(), (torch.randn(2, 4),), ratio={"b": 0.5})
        assert (small.first.out_features, small.a.in_features, small.out.in_features) == (3, 3, 3)
        assert small.a is small.b

    @pytest.mark.parametrize(
        ("by_key", "said"),
        [
            ({}, "empty"),
            ({3: 0.5}, "not 3"),
            ({"": 0.5}, "not ''"),
            ({"neck": 1.0}, r"ratio of 'neck' must be a number in \[0, 1\), not 1.0"),
            ({"neck": True}, "not True"),
            ({"neck": "half"}, "not 'half'"),
            ({"nekc": 0.5}, r"nothing in the model is called 'nekc', .*did you mean 'neck'"),
            ({"steam": 0.5}, r"did you mean 'stream'|'stream'"),
            ({"layer1.(": 0.5}, "nor a regular expression"),
            ({"layer1.[5-9]": 0.5}, "nor does it match a whole path"),
            ({"head": 0.5}, r"'head' claims no channels that can go \(an output of the model\)"),
            (
                {"0.conv2": 0.5, "1.conv2": 0.25},
                r"'0.conv2' \(0.5\) and '1.conv2' \(0.25\) both claim the channels of group 'stream'",
            ),
            ({"layer1.0.conv2": 0.5, "stem": 0.25}, r"both claim the channels of group 'stream'"),
            ({r"layer1.0.*": 0.5, r"layer.*conv1": 0.25}, "both claim the channels of group 'layer1.0.conv1'"),
        ],
    )
    def test_keys_that_make_no_sense_are_refused(self, by_key, said):
        with pytest.raises(PatternError, match=said):
            cocktail.slim(net(), (X,), ratio=by_key)

    def test_a_container_that_only_has_a_part_in_a_group_does_not_claim_it(self):
        class Two(nn.Module):
            def __init__(self):
                super().__init__()
                self.left = nn.ModuleDict({"proj": nn.Linear(6, 8)})
                self.right = nn.Linear(6, 8)
                self.out = nn.Linear(8, 2)

            def forward(self, x):
                return self.out(torch.relu(self.left["proj"](x) + self.right(x)))

        model, x = Two(), torch.randn(2, 6)
        with pytest.raises(PatternError, match="'left' claims no group of channels: it only has a part in 'stream'"):
            cocktail.slim(model, (x,), ratio={"left": 0.5})
        assert cocktail.slim(model, (x,), ratio={"left": 0.0, "*": 0.5}).right.out_features == 4
        assert cocktail.slim(model, (x,), ratio={"proj": 0.5}).right.out_features == 4

    def test_what_keeps_its_channels_may_be_named_with_ratio_none(self):
        assert slimmed(ratio={"*": 0.5, "head": 0.0}) == slimmed(ratio=0.5)


class TestMinWidth:
    def test_every_group_keeps_so_many_channels_or_all(self):
        assert slimmed(ratio=0.9, min_width=10) == {
            "stream": 10, "layer1.0.conv1": 8, "layer1.1.conv1": 10, "neck": 10
        }  # fmt: skip
        assert slimmed(ratio=0.5, min_width=1) == slimmed(ratio=0.5)

    def test_it_is_rounded_up_to_the_multiple(self):
        assert slimmed(ratio=0.9, min_width=10, round_to=8) == {
            "stream": 16, "layer1.0.conv1": 8, "layer1.1.conv1": 16, "neck": 16
        }  # fmt: skip

    def test_units_of_several_channels_count_all_of_them(self):
        model, x = Attention(), torch.randn(2, 3, 10)
        heads = next(g for g in couple(model, (x,)).groups if g.size == 8)
        assert heads.channels == 4
        for least, kept in [(1, 4), (4, 4), (5, 8), (16, 16), (18, 20), (64, 32)]:
            assert cocktail.slim(model, (x,), ratio=0.9, min_width=least).v.out_features == kept

    @pytest.mark.parametrize("wrong", [0, -1, 1.5, True, "8"])
    def test_wrong_widths_are_refused(self, wrong):
        with pytest.raises(PatternError, match="min_width"):
            slimmed(min_width=wrong)


def removed_by(found, seed=0, **options):
    """The units that a choice takes, for laws that need no slimming."""
    scope, ratio = options.pop("scope", "global"), options.pop("ratio", 0.5)
    model = net(seed)
    return Choice(found, scores_of(model, found, "magnitude", scope), pools(ratio, scope, model, found), **options)


class TestGlobal:
    @settings(max_examples=40, deadline=None)
    @given(st.integers(0, 1000), st.floats(0.0, 0.95))
    def test_exactly_that_share_of_all_units_goes_and_the_least_of_them(self, seed, ratio):
        found = couple_once()
        choice = removed_by(found, seed, ratio=ratio)
        removed, n = choice.removed(), found.n_units
        assert int(removed.sum()) == min(round(ratio * n), n - len(found.groups))
        for g in found.groups:
            assert not bool(removed[g.start : g.stop].all())
        if int(removed.sum()) and not any(int((~removed)[g.start : g.stop].sum()) == 1 for g in found.groups):
            assert choice.scores[removed].max() <= choice.scores[~removed].min()

    @settings(max_examples=40, deadline=None)
    @given(st.integers(0, 1000), st.floats(0.0, 0.99), st.integers(1, 20), st.sampled_from([1, 4, 8]))
    def test_minimum_widths_hold_and_what_they_hold_back_goes_elsewhere(self, seed, ratio, least, multiple):
        found = couple_once()
        removed = removed_by(found, seed, ratio=ratio, min_width=least, round_to=multiple).removed()
        kept = {g.name: int((~removed)[g.start : g.stop].sum()) for g in found.groups}
        for g in found.groups:
            assert kept[g.name] >= min(g.size, least)
            assert kept[g.name] == g.size or kept[g.name] % multiple == 0
        if multiple == 1:
            spare = sum(max(g.size - least, 0) for g in found.groups)
            assert int(removed.sum()) == min(round(ratio * found.n_units), spare)

    @settings(max_examples=30, deadline=None)
    @given(st.integers(0, 1000), st.floats(0.0, 0.99), st.floats(0.0, 0.99), st.sampled_from(["group", "global"]))
    def test_what_goes_at_a_lower_ratio_goes_at_a_higher(self, seed, a, b, scope):
        less, more = (removed_by(couple_once(), seed, ratio=r, scope=scope).removed() for r in sorted((a, b)))
        assert not bool((less & ~more).any())

    def test_ties_go_by_position(self):
        model = net()
        for p in model.parameters():
            nn.init.ones_(p)
        found = couple_once()
        choice = Choice(found, scores_of(model, found, "magnitude", "global"), pools(0.25, "global", model, found))
        assert choice.removed().nonzero().flatten().tolist() == [*range(15), *range(16, 21)]

    def test_groups_are_comparable_whatever_they_are_made_of(self):
        scores = scores_of(net(), couple_once(), "magnitude", "global")
        for g in couple_once().groups:
            assert float(scores[g.start : g.stop].mean()) == pytest.approx(1.0)

    def test_one_group_is_the_same_globally(self):
        model, x = nn.Sequential(nn.Linear(4, 20), nn.ReLU(), nn.Linear(20, 2)), torch.randn(1, 4)
        for ratio in (0.1, 0.325, 0.9, 0.99):
            a, b = (cocktail.slim(model, (x,), ratio=ratio, scope=scope) for scope in ("group", "global"))
            assert same(a, b)

    def test_a_model_is_slimmed_globally(self):
        model = net()
        with torch.no_grad():
            model.neck.weight[:20] *= 1e-3  # hardly anything in 20 of its 32 channels
        got = widths(cocktail.slim(model, (X,), ratio=0.25, scope="global"))
        assert sum(SIZES.values()) - sum(got.values()) == 20
        assert got["neck"] == 12

    def test_a_mappings_keys_are_ranked_apart(self):
        got = slimmed(ratio={"conv1": 0.5, "neck": 0.25}, scope="global")
        assert got["layer1.0.conv1"] + got["layer1.1.conv1"] == 16
        assert (got["stream"], got["neck"]) == (16, 24)
        assert slimmed(ratio={"*": 0.4}, scope="global") == slimmed(ratio=0.4, scope="global")

    def test_other_scopes_are_refused(self):
        with pytest.raises(PatternError, match="scope must be 'group' or 'global', not 'layer'"):
            slimmed(scope="layer")


_FOUND: list[Coupling] = []


def couple_once():
    if not _FOUND:
        _FOUND.append(couple(net(), (X,)))
    return _FOUND[0]


class TestTargets:
    @pytest.mark.parametrize("scope", ["group", "global"])
    @pytest.mark.parametrize("ratio", [0.5, {"conv1": 0.2, "*": 0.4}, {"neck": 0.3, "layer1": 0.9}])
    @pytest.mark.parametrize("kind", ["flops", "params"])
    @pytest.mark.parametrize("multiple", [1, 4])
    def test_met_and_one_unit_less_does_not_meet_it(self, scope, ratio, kind, multiple):
        found = couple_once()
        proportions = ratio if isinstance(ratio, dict) else 1.0
        choice = removed_by(found, scope=scope, ratio=proportions, round_to=multiple)
        count = getattr(found, kind)
        removed = Target(**{kind: 0.8}).meet(choice)
        assert count(removed) <= 0.8 * count()
        top = 1.0 / max(p.ratio for p in choice.pools)
        less = [r for i in range(2001) if int((r := choice.removed(i / 2000 * top)).sum()) < int(removed.sum())]
        assert less
        assert all(count(r) > 0.8 * count() for r in less)

    def test_a_number_beside_a_target_says_nothing_and_a_mapping_gives_the_proportions(self):
        assert slimmed(ratio=0.1, flops=0.5) == slimmed(flops=0.5) == slimmed(ratio={"*": 0.3}, flops=0.5)
        got = slimmed(ratio={"neck": 0.2, "conv1": 0.4}, params=0.8)
        assert got["stream"] == 16
        gone = {k: 1 - got[k] / SIZES[k] for k in ("neck", "layer1.1.conv1")}
        assert gone["layer1.1.conv1"] == pytest.approx(2 * gone["neck"], abs=1 / 16)

    def test_both_targets_are_met(self, coupling):
        small = cocktail.slim(net(), (X,), flops=0.6, params=0.3, scope="global")
        after = couple(small, (X,))
        assert after.flops() <= 0.6 * coupling.flops()
        assert after.params() <= 0.3 * coupling.params()

    @pytest.mark.parametrize("options", [{"min_width": 16}, {"ratio": {"neck": 0.5}}, {"ratio": {"*": 0.0}}])
    def test_what_may_not_be_narrowed_can_put_a_target_out_of_reach(self, options):
        with pytest.raises(PatternError, match=r"cannot be met: flops=0.05 \(at least [01]\.\d+ stays\)"):
            slimmed(flops=0.05, **options)


class TestImportance:
    def test_a_function_says_which_units_go(self):
        model = net()
        small = cocktail.slim(model, (X,), importance=lambda umg: torch.arange(umg.coupling.n_units))
        assert torch.equal(small.neck.bias, model.neck.bias[16:])

    def test_it_sees_every_parameter(self):
        seen = {}

        def importance(umg):
            seen.update(umg.values)
            return torch.rand(umg.coupling.n_units, generator=torch.Generator().manual_seed(0))

        model = net()
        cocktail.slim(model, (X,), importance=importance, scope="global")
        assert set(seen) == {n for n, _ in model.named_parameters()}

    @pytest.mark.parametrize(
        ("wrong", "said"),
        [
            ("taylor", "'magnitude' or a function, not 'taylor'"),
            (None, "not None"),
            (lambda umg: torch.ones(3), r"shape \[80\], one score a unit, not shape \[3\]"),
            (lambda umg: [1.0], "not a list"),
            (lambda umg: torch.full((80,), math.nan), "not finite"),
        ],
    )
    def test_others_are_refused(self, wrong, said):
        with pytest.raises(PatternError, match=said):
            slimmed(importance=wrong)


@settings(max_examples=12, deadline=None)
@given(st.randoms(use_true_random=False))
def test_slim_equals_masked_whatever_the_options(rng: random.Random):
    model, found = net(rng.randrange(100)).double(), couple_once()
    x = X.double()
    ratio = rng.choice([0.3, {"conv1": 0.6, "neck": 0.2}, {"*": 0.5, "stream": 0.1}])
    options = {
        "scope": rng.choice(["group", "global"]),
        "min_width": rng.randint(1, 9),
        "round_to": rng.choice([1, 2, 8]),
    }
    slim = cocktail.slim(model, (x,), ratio=ratio, **options)
    scope = options.pop("scope")
    choice = Choice(found, scores_of(model, found, "magnitude", scope), pools(ratio, scope, model, found), **options)
    with torch.no_grad():
        tensors = dict(model.named_parameters())
        for name, keep in found.masks(choice.removed()).items():
            tensors[name].mul_(keep)
        want = tensors_in(model(x))
        assert relative_error(tensors_in(slim(x)), want, want) <= 1e-9


def test_pools_of_nothing_take_nothing():
    group = Group("a", 0, 4, ("a.weight",), ())
    found = Coupling((), (Producer("a.weight", 0, torch.arange(4)),), (group,), {}, (), (), {})
    assert not bool(Choice(found, torch.ones(4, dtype=torch.float64), ()).removed().any())
    assert int(Choice(found, torch.ones(4, dtype=torch.float64), (Pool((group,), 0.5),)).removed(9.0).sum()) == 3


@pytest.mark.parametrize("backend", ["nni", None])
def test_other_backends_are_refused(backend):
    with pytest.raises(PatternError, match="backend must be 'cocktail' or 'torch-pruning'"):
        slimmed(backend=backend)
