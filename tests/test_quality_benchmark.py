"""The harness that compares methods: its runs are real, its rows are kept, and its sums are right."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def row(method: str, seed: int, networks: dict[str, float], pattern: str = "all") -> dict[str, object]:
    return {
        "task": "cifar", "method": method, "pattern": pattern, "seed": seed, "budget": 100, "networks": networks,
        "parameters": 10, "stored": 20, "seconds": 3.0,
    }  # fmt: skip


def test_lines_are_means_over_networks_then_seeds(tmp_path: Path) -> None:
    from quality_rows import lines, read, write

    networks = {"dense": 0.9, "unstructured@0.2": 0.8, "unstructured@0.4": 0.6, "2:4": 0.7, "channel@0.1": 0.5}
    rows = [row("paper", 0, networks), row("paper", 1, {**networks, "2:4": 0.9})]
    rows += [
        row("imp", 0, {"dense": 0.9, "2:4": 0.8}, "n:m"),
        row("imp", 0, {"dense": 0.8, "channel@0.1": 0.4}, "channel"),
    ]
    write(rows, tmp_path / "quality.json")
    paper, imp = lines(read(tmp_path / "quality.json"))
    assert (paper.method, paper.seeds, paper.dense) == ("paper", 2, pytest.approx(90))
    assert paper.means == {k: pytest.approx(v) for k, v in {"unstructured": 70, "n:m": 80, "channel": 50}.items()}
    assert paper.sparse == pytest.approx((65 + 70) / 2)  # of four networks a seed
    assert paper.spread == pytest.approx(100 * 0.05 / 2**0.5)
    assert imp.means["unstructured"] is None and imp.sparse is None and imp.spread is None
    assert imp.dense == pytest.approx(85) and imp.stored == 4 and imp.seconds == 6


def test_every_method_has_patterns_that_there_are() -> None:
    from quality_rows import PATTERNS, methods

    found = methods()
    assert {"cocktail", "paper", "imp", "us-net", "paper-no-umg", "paper + finishing"} <= found.keys()
    for method in found.values():
        assert method.runs.keys() <= PATTERNS.keys()
        assert all(0 < share <= 3 for share in method.runs.values())  # of the budget of steps


@pytest.mark.slow
def test_a_run_is_measured_and_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import quality
    from quality_rows import Run, read

    results = tmp_path / "quality.json"
    arguments = ["--task", "digits", "--method", "paper-no-merging", "--steps", "220", "--jobs", "1"]
    arguments += ["--out", str(tmp_path / "runs"), "--results", str(results)]
    monkeypatch.setattr(sys, "argv", ["quality.py", *arguments])
    assert quality.main() == 0
    (found,) = read(results)
    assert Run("digits", "paper-no-merging", "all", 0).found_in([found], 220)
    assert len(found["networks"]) == 24 and found["networks"]["dense"] > 0.3
    assert 0 < found["steps"] <= 220 and found["stored"] == found["parameters"]
    assert set(found["overlap"]) == {n for n in found["networks"] if n.startswith("channel")}
    assert all(0 < share < 1 for share in found["overlap"].values())
    before = results.read_text()
    assert quality.main() == 0 and results.read_text() == before  # nothing is run twice
    assert json.loads(before)["rows"][0]["command"].startswith("python benchmarks/quality.py")


@pytest.mark.slow
def test_the_gpu_run_stops_and_goes_on_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import quality_gpu

    results = tmp_path / "gpu.json"
    arguments = ["--try", "--device", "cpu", "--epochs-scale", "0.01", "--recipe", "paper", "--results", str(results)]
    arguments += ["--out", str(tmp_path / "runs")]
    monkeypatch.setattr(sys, "argv", ["quality_gpu.py", *arguments, "--minutes", "0.02"])
    assert quality_gpu.main() == 3 and not results.exists()
    monkeypatch.setattr(sys, "argv", ["quality_gpu.py", *arguments])
    assert quality_gpu.main() == 0
    (row,) = json.loads(results.read_text())["rows"]
    assert row["steps"] == 3 * 2 * 4 and {"dense", "2:4", "channel@0.19"} <= row["networks"].keys()
