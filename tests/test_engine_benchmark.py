"""The benchmark of the engine: what it measures is real, agrees with its rivals, and is summed up rightly."""

from __future__ import annotations

from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_masks_are_those_of_the_usual_way(dtype: str) -> None:
    from engine_umg import against

    found = against("2e5", dtype, 1)  # compares them
    assert found["weights"] == pytest.approx(2e5, rel=0.1)
    assert all(seconds > 0 for seconds in found["rows"][0].values())


@pytest.mark.parametrize("recipe", ["paper", "paper-finishing"])
def test_as_many_dense_steps_are_timed_as_steps_of_co_training(recipe: str) -> None:
    from engine import pooled
    from engine_steps import TURNS, step_times

    found = step_times("tiny", recipe, turns=2, batch=4)
    assert sum(row["steps"] for row in found["rows"]) == 2 * TURNS
    assert pooled(found["rows"]) > 0


def test_memory_is_what_is_held_and_what_comes_on_top() -> None:
    from engine_steps import step_memory

    found = step_memory("tiny", "paper-finishing", batch=2)
    assert found["ours"] > found["dense"] > 2 * found["prunable"] > 0  # weights and momentum at least


def test_exponents_are_slopes_in_logarithms() -> None:
    from engine_umg import exponent

    assert exponent([1, 10, 100], [3, 30, 300]) == pytest.approx(1)
    assert exponent([1, 2, 4], [1, 4, 16]) == pytest.approx(2)


def test_misses_and_skips_are_told() -> None:
    from engine import lines

    row = {"ours": 3.0, "dense": 2.0, "ours_processor": 3.0, "dense_processor": 2.0, "steps": 6}
    told = lines(
        {
            "step vit paper": {"recipe": "paper", "rows": [row]},
            "gpu step vit paper": {"skipped": "no CUDA device"},
        }
    )
    assert told[0][1].startswith("1.500 x dense") and not told[0][3]
    assert told[1][1] == "skipped: no CUDA device"
