"""The benchmark of runtimes: its rows are ordered, counted against the goal, and shown."""

from __future__ import annotations

from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def row(runtime: str, network: str, ratio: float, pattern: str = "channel", flops: float = 0.5) -> dict[str, object]:
    return {"runtime": runtime, "network": network, "ratio": ratio, "pattern": pattern, "flops": flops}


def test_rows_stand_by_pattern_and_cost_and_the_goal_is_counted_by_runtime() -> None:
    from deploy_rows import GOAL, goal, in_order

    rows = [
        row("openvino", GOAL, 4.1, flops=0.16),
        row("onnxruntime", GOAL, 3.9, flops=0.16),
        row("torch eager", GOAL, 4.0, flops=0.16),
        row("openvino", "channel@0.1", 1.2, flops=0.8),
        row("openvino", "2:4", 1.0, "n:m", 1.0),
        row("openvino", "unstructured@0.2", 1.0, "unstructured", 1.0),
    ]
    assert list(in_order(rows)) == ["unstructured@0.2", "2:4", "channel@0.1", GOAL]
    assert goal(rows) == (2, {"openvino": 4.1, "onnxruntime": 3.9, "torch eager": 4.0})
    assert set(in_order(rows)[GOAL]) == {"openvino", "onnxruntime", "torch eager"}


def test_the_goal_is_one_of_the_networks_and_comes_first() -> None:
    from deploy import network_names
    from deploy_rows import GOAL

    names = list(network_names())
    assert names[0] == GOAL and len(names) == 23 and "dense" not in names


def test_a_row_replaces_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import deploy

    monkeypatch.setattr(deploy, "RESULTS", tmp_path / "deploy.json")
    for ratio in (1.0, 2.0):
        deploy.keep({**row("openvino", "2:4", ratio), "batch": 1, "threads": 2})
    deploy.keep({**row("openvino", "2:4", 3.0), "batch": 1, "threads": 1})
    assert [r["ratio"] for r in deploy.read()] == [2.0, 3.0]
