"""Names, spec strings and objects become patterns; a user's own pattern works everywhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from squares import Square
from tiny import TinyNet, tiny_net

import cocktailsdk as cocktail
from cocktailsdk import NM, Channel, Pattern, PatternError, Unstructured
from cocktailsdk.patterns import in_order, parse_pattern, registered, resolve_patterns, rounds_of


def test_the_default_is_24_networks():
    net = tiny_net()
    assert len(net.names) == 24
    assert net.names[:4] == ["dense", "unstructured@0.2", "unstructured@0.36", "unstructured@0.488"]
    assert net.names[11:16] == ["1:2", "2:4", "4:8", "channel@0.1", "channel@0.19"]
    assert net.names[-1] == "channel@0.651"


@pytest.mark.parametrize(
    ("spec", "pattern"),
    [
        ("unstructured", Unstructured()),
        ("unstructured@0.5", Unstructured([0.5])),
        ("channel@0.3", Channel([0.3])),
        ("n:m", NM()),
        ("2:4", NM(2, 4)),
        (" 3:16 ", NM(3, 16)),
        ("square", Square()),
        ("square@0.5", Square([0.5])),
    ],
)
def test_strings_stand_for_patterns(spec, pattern):
    assert parse_pattern(spec) == pattern


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("unstuctured", "did you mean 'unstructured'"),
        ("chanel@0.3", "did you mean 'channel'"),
        ("channel@lots", "'lots' is not a number"),
        ("channel@1.3", "not in"),
        ("4:2", "0 < n < m"),
        ("", "unknown pattern"),
        ("zzz", "'2:4'"),
    ],
)
def test_unknown_strings_are_refused_with_what_is_known(spec, said):
    with pytest.raises(PatternError, match=said):
        resolve_patterns([spec])


def test_one_name_given_twice_is_one_pattern():
    assert resolve_patterns(["1:2", "2:4", NM(2, 4)]) == (NM(pairs=[(1, 2), (2, 4)]),)
    assert resolve_patterns(["unstructured@0.7", "unstructured@0.5"]) == (Unstructured([0.5, 0.7]),)
    with pytest.raises(PatternError, match="given twice"):
        resolve_patterns(["channel@0.3", Channel([0.5], beta=0.5)])


@pytest.mark.parametrize("bad", [[], [3], 7, [Channel], None])
def test_what_is_no_pattern_is_refused(bad):
    with pytest.raises(PatternError):
        resolve_patterns(bad)


def test_registration_refuses_taken_names_bad_names_and_other_classes():
    with pytest.raises(PatternError, match="taken"):

        @cocktail.register_pattern("channel")
        class Other(Pattern):
            pass

    for name in ("dense", "", "a@b", "2:4", 5):
        with pytest.raises(PatternError, match="cannot be named"):
            cocktail.register_pattern(name)
    with pytest.raises(PatternError, match="not a subclass"):
        cocktail.register_pattern("fine")(dict)
    assert "fine" not in registered()


def test_an_unregistered_class_is_refused():
    class Nameless(Square):
        name = ""

    with pytest.raises(PatternError, match="register_pattern"):
        resolve_patterns([Nameless()])


def test_every_config_makes_an_equal_pattern():
    for p in (
        Unstructured(),
        Unstructured([0.1, 0.9]),
        NM(),
        NM(1, 4),
        Channel(),
        Channel([0.2], beta=0.5, round_to=4),
    ):
        assert type(p)(**p.config()) == p
    assert Unstructured() != Unstructured(rounds=5)


def test_masks_are_made_after_those_they_look_at():
    assert [p.name for p in in_order([Channel(), NM(), Unstructured()])] == ["n:m", "unstructured", "channel"]
    plan = rounds_of([Channel(), NM(), Unstructured()])
    assert len(plan) == 10
    assert plan[0]["n:m"] == ()
    assert plan[1]["n:m"][0].name == "1:2"


def test_a_users_pattern_goes_through_sparsify_bundle_and_back(tmp_path):
    net = cocktail.sparsify(TinyNet(), ["square", "2:4", "channel@0.25"], example_inputs=torch.randn(2, 3, 6, 6))
    assert net.names == ["dense", "square@0.25", "square@0.5", "2:4", "channel@0.25"]
    report = {r.name: r for r in net.subnets()}
    assert report["square@0.5"].sparsity_exact == pytest.approx(0.5)
    net.save_pretrained(tmp_path / "bundle")
    loaded = cocktail.from_pretrained(tmp_path / "bundle", TinyNet())
    assert loaded.subnets() == net.subnets()
    assert isinstance(loaded.patterns[0], Square)
    for name in net.names:
        with net.using(name), loaded.using(name):
            assert all(
                torch.equal(a, b) for a, b in zip(net.model.parameters(), loaded.model.parameters(), strict=True)
            )


def documented_strings():
    """Every spec string in the documentation's table of patterns."""
    text = (Path(__file__).parents[1] / "docs" / "patterns.md").read_text(encoding="utf-8")
    rows = [line.split("|") for line in text.splitlines() if line.startswith("| `")]
    return [(row[1].strip(" `"), spec) for row in rows for spec in re.findall(r'`"([^"]+)"`', row[2])]


@pytest.mark.parametrize(("name", "spec"), documented_strings())
def test_the_documented_strings_are_known(name, spec):
    assert parse_pattern(spec).name == name


def test_every_pattern_is_documented():
    own = {name for name, cls in registered().items() if cls.__module__.startswith("cocktailsdk.")}
    assert own == {name for name, _ in documented_strings()}
