"""Shares of passes: by pattern, by measured need, and given out evenly in time."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from fractions import Fraction
from types import MappingProxyType

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from training_tiny import tiny_net

from cocktailsdk import TrainingError
from cocktailsdk.training.pass_shares import PassShares
from cocktailsdk.training.recipes import PassAllocation, recipe_named

SUBNETS = {"unstructured": ("u1", "u2", "u3"), "n:m": ("2:4",), "channel": ("c1", "c2"), "heads": ("h1",)}
NAMES = [name for names in SUBNETS.values() for name in names]
MEMBERS = {pattern: len(names) for pattern, names in SUBNETS.items()}


def test_patterns_share_what_the_dense_network_leaves_in_proportion_to_their_weights() -> None:
    weights = {"channel": 0.6, "unstructured": 0.2, "n:m": 0.1}
    shares = PassAllocation(dense=0.2, patterns=weights, others=0.1).shares(SUBNETS, {})
    assert shares["dense"] == pytest.approx(0.2)
    assert sum(shares.values()) == pytest.approx(1)
    by_pattern = {pattern: sum(shares[name] for name in names) for pattern, names in SUBNETS.items()}
    assert by_pattern == pytest.approx({"unstructured": 0.16, "n:m": 0.08, "channel": 0.48, "heads": 0.08})


def test_before_anything_is_measured_need_is_the_place_in_the_pattern() -> None:
    shares = PassAllocation(dense=0.2, floor=0.0).shares({"channel": ("a", "b", "c")}, {})
    assert [shares[name] for name in "abc"] == pytest.approx([0.8 / 6, 1.6 / 6, 2.4 / 6])


def test_within_a_pattern_passes_follow_the_gap_with_a_floor_for_each() -> None:
    gaps = {"dense": 0.0, "a": 0.04, "b": 0.16, "c": 0.64}
    shares = PassAllocation(dense=0.0, floor=0.25, power=0.5).shares({"channel": ("a", "b", "c")}, gaps)
    expected = [0.25 / 3 + 0.75 * root / 1.4 for root in (0.2, 0.4, 0.8)]
    assert [shares[name] for name in "abc"] == pytest.approx(expected)
    assert shares["dense"] == 0


def test_a_network_better_than_the_teacher_and_one_without_a_loss_keep_a_share() -> None:
    held = PassShares(PassAllocation(), SUBNETS, 100)
    losses = dict.fromkeys(("dense", *NAMES), 1.0)
    held.update([{"step": 0, "losses": {**losses, "u1": 0.2, "u2": math.inf, "u3": math.nan, "c1": 3.0}}])
    assert all(math.isfinite(share) and share > 0 for share in held.shares.values())
    assert sum(held.shares.values()) == pytest.approx(1)
    assert held.shares["u2"] == held.shares["u3"] > held.shares["u1"]


@given(st.lists(st.floats(-1, 8), min_size=len(NAMES), max_size=len(NAMES)), st.integers(50, 400), st.floats(0, 0.9))
def test_at_any_time_every_network_has_had_its_share_within_a_pass(gaps: list[float], steps: int, dense: float) -> None:
    passes = PassShares(PassAllocation(dense=dense), SUBNETS, steps)
    losses = {"dense": 1.0, **{name: 1.0 + gap for name, gap in zip(NAMES, gaps, strict=True)}}
    passes.update([{"step": 0, "losses": losses}])
    count = dict.fromkeys(passes.shares, 0)
    for step in range(1, steps + 1):
        due = passes.due()
        chosen = max(due, key=lambda name: due[name])
        passes.give([chosen])
        count[chosen] += 1
        assert sum(passes.owed.values()) == pytest.approx(0, abs=1e-6)
        for name, share in passes.shares.items():
            # smooth weighted round robin: never a whole round behind
            assert count[name] >= share * step - len(count)
            assert count[name] <= share * step + 1


@pytest.mark.parametrize(("steps", "networks", "measured"), [
    (400, 24, (0, 40, 80, 140, 200, 260, 320)),
    (50, 24, (0, 17, 32)),
    (50, 200, (0,)),
])  # fmt: skip
def test_measurements_of_a_short_run_are_further_apart(steps: int, networks: int, measured: tuple[int, ...]) -> None:
    assert PassAllocation().measured_steps(steps, networks) == measured


def test_with_a_floor_of_one_or_no_fractions_nothing_is_measured() -> None:
    assert PassAllocation(floor=1.0).measured_steps(400, 24) == ()
    assert PassAllocation(measure_at=()).measured_steps(400, 24) == ()


@pytest.mark.parametrize(("field", "value"), [
    ("dense", 1.0), ("dense", -0.1), ("floor", 2), ("power", math.nan), ("others", -1), ("examples", 0),
    ("measure_at", (0.5, 1.0)), ("patterns", {"channel": -1.0}), ("patterns", {"channel": "much"}), ("power", 5),
])  # fmt: skip
def test_settings_that_make_no_sense_are_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(TrainingError, match=rf"PassAllocation\.{field}.* must be a number"):
        PassAllocation(**{field: value})


@pytest.mark.parametrize(("field", "value"), [("patterns", None), ("patterns", [1.0]), ("measure_at", 0.5)])
def test_settings_of_another_kind_are_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(TrainingError, match=rf"PassAllocation\.{field} must be"):
        PassAllocation(**{field: value})


def test_numbers_of_any_kind_become_plain_ones() -> None:
    allocation = PassAllocation(
        dense=Fraction(1, 4),  # type: ignore[arg-type]
        examples=np.int64(64),  # type: ignore[arg-type]
        patterns=MappingProxyType({"channel": np.float32(1)}),  # type: ignore[dict-item]
        measure_at=np.array([0.0, 0.5]),  # type: ignore[arg-type]
    )
    described = replace(recipe_named("pretrained"), allocation=allocation).describe()
    assert json.loads(json.dumps(described))["allocation"]["dense"] == 0.25


def test_a_weight_for_a_pattern_that_does_not_exist_is_refused() -> None:
    recipe = replace(recipe_named("pretrained"), allocation=PassAllocation(patterns={"chanel": 1.0}))
    with pytest.raises(TrainingError, match="did you mean 'channel'"):
        recipe.plan(tiny_net().patterns)


def test_gaps_and_powers_of_any_size_give_finite_shares() -> None:
    subnets = {"channel": ["a", "b"]}
    for gaps in ({"a": 1e300, "b": 0.0}, {"a": -5.0, "b": 0.0}):
        shares = PassAllocation(power=4).shares(subnets, gaps)
        assert math.isclose(sum(shares.values()), 1)
