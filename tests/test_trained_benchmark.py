"""The comparison from trained weights: the exchange rate is computed as defined, and rows are kept and found again."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import cocktailsdk as cocktail

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"

CURVE = {0: 20.0, 16: 36.0, 50: 45.0, 133: 56.0, 400: 68.0, 800: 70.0}
"""A subnetwork alone: accuracy in % by passes."""


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def row(run: str, budget: int, accuracies: dict[str, float], **others: Any) -> dict[str, Any]:
    made = {"task": "resnet20", "run": run, "budget": budget, "passes": budget, "seed": 0, "rate": None}
    made |= {"accuracies": accuracies, "cpu_seconds": 30.0, **others}
    return {**made, "key": f"{run}--{budget}--{made['rate']}--{made['seed']}"}


def test_a_run_as_good_as_16_passes_alone_has_the_rate_23_times_16_by_400() -> None:
    from trained_rate import exchange_rate

    found = exchange_rate({"a": 36.0, "b": 36.0, "dense": 80.0}, 400, {"a": CURVE, "b": CURVE}, 400)
    assert found.rate == pytest.approx(23 * 16 / 400)
    assert found.alone == {"a": pytest.approx(16), "b": pytest.approx(16)} and not found.left_out and not found.clipped


def test_passes_alone_are_interpolated_over_their_logarithm() -> None:
    from trained_rate import passes_alone

    assert passes_alone(62.0, CURVE) == pytest.approx(math.sqrt(133 * 400))  # half way from 56 to 68
    assert passes_alone(28.0, CURVE) == pytest.approx(4)  # half way from 0 passes, which count as 1, to 16


def test_passes_alone_are_clipped_to_the_runs_that_there_are() -> None:
    from trained_rate import exchange_rate, passes_alone

    assert passes_alone(15.0, CURVE) == passes_alone(20.0, CURVE) == 0
    assert passes_alone(75.0, CURVE) == 800
    assert exchange_rate({"a": 75.0}, 400, {"a": CURVE}, 400).clipped == ("a",)
    assert exchange_rate({"a": 75.0}, 400, {"a": CURVE}, 400).rate == pytest.approx(23 * 800 / 400)


def test_runs_alone_that_fall_are_fitted_by_a_curve_that_does_not() -> None:
    from trained_rate import passes_alone

    curve = {0: 20.0, 16: 40.0, 50: 36.0, 400: 60.0}  # 16 and 50 passes are levelled at 38
    assert passes_alone(38.0, curve) == pytest.approx(16)
    assert passes_alone(49.0, curve) == pytest.approx(math.sqrt(50 * 400))


def test_a_subnetwork_that_training_alone_hardly_improves_is_left_out_and_listed() -> None:
    from trained_rate import exchange_rate

    close = {0: 80.0, 400: 81.4, 800: 81.6}
    found = exchange_rate({"a": 36.0, "close": 81.0}, 400, {"a": CURVE, "close": close}, 400)
    assert found.left_out == ("close",) and found.rate == pytest.approx(23 * 16 / 400)


def test_a_curve_without_the_budget_is_refused() -> None:
    from trained_rate import exchange_rate

    with pytest.raises(ValueError, match="the curve of a needs runs alone with 0 and 400 passes"):
        exchange_rate({"a": 36.0}, 400, {"a": {0: 20.0, 16: 36.0}}, 400)
    with pytest.raises(ValueError, match="left out: close"):
        exchange_rate({"close": 81.0}, 400, {"close": {0: 80.0, 400: 81.4}}, 400)


def test_tables_have_the_means_of_seeds_and_the_better_rate_of_a_rival(tmp_path: Path) -> None:
    from trained_pieces import alone_name
    from trained_rows import add_row, alone_table, curves, run_table, target_table
    from trained_tasks import FIVE, NAMED

    rows = [row("start", 0, dict.fromkeys(NAMED, 20.0))]
    for budget, value in CURVE.items():
        if budget:
            rows += [row(alone_name(n), budget, {n: value}, rate=0.02) for n in FIVE]
    rows += [row(alone_name("2:4"), 400, {"2:4": 69.0}, rate=0.05)]  # a probe: the rate is chosen once for a pattern
    rows += [row("ours", 400, dict.fromkeys(NAMED, value), seed=i) for i, value in enumerate((35.0, 37.0))]
    rows += [row("us-net", 400, {"dense": 70.0, "channel@0.469": v}, rate=r) for r, v in ((0.02, 50.0), (0.05, 53.0))]
    for one in rows:
        add_row(one, tmp_path / "trained.json")
    add_row(rows[0], tmp_path / "trained.json")  # takes the place of the row of the same run
    kept = json.loads((tmp_path / "trained.json").read_text())["rows"]
    assert len(kept) == len(rows)
    assert curves(kept)["2:4"] == CURVE
    lines = run_table(kept).splitlines()
    ours, us_net = (next(x for x in lines if x.startswith(f"| {name} |")) for name in ("ours", "us-net"))
    assert ours.count(" 36.0 ") == len(NAMED) and "| 2 |" in ours and " 0.9 " in ours
    assert "| 0.05 |" in us_net and " 53.0 " in us_net
    assert "| c@.469 | 400 | 64.0 | 36.0 | 35.0 | -28.0 |" in target_table(kept)
    assert "| exchange rate | 400 | 12.0 | 0.9 |" in target_table(kept)
    assert "| alone, labels | 16 | 36.0 |" in alone_table(kept) and "| no training | 0 | 20.0 |" in alone_table(kept)


def test_every_piece_has_runs_with_names_of_their_own(tmp_path: Path) -> None:
    from trained import pieces
    from trained_pieces import PROBES, RATES, alone_name

    rows = [row(alone_name(n), 400, {n: 70.0 - rate}, rate=rate) for n in PROBES.values() for rate in RATES]
    known = pieces(long_passes=1_000)
    keys = {name: [(piece.task, run.key) for run in piece.runs(rows, [0, 1, 2])] for name, piece in known.items()}
    assert all(keys.values()) and len(keys["ours"]) == 3
    every = [key for of in keys.values() for key in of]
    probed = set(keys["probes"]) & set(keys["alone"])
    assert len(probed) == 3 and len(every) == len(set(every)) + len(probed)  # probes are runs alone with B passes


@pytest.fixture
def place(tmp_path: Path) -> Any:
    """A small trained model and a few images of two classes that differ in brightness."""
    from trained_runs import Place
    from trained_tasks import Task

    from cocktailsdk.presets import Loaders
    from cocktailsdk.presets.datasets import Images, TensorLoader
    from cocktailsdk.presets.models import CifarResNet

    labels = torch.arange(160) % 2
    pixels = torch.randint(0, 60, (160, 3, 8, 8), generator=torch.Generator().manual_seed(0))
    data = Images((pixels + 120 * labels[:, None, None, None]).to(torch.uint8), labels)
    train = TensorLoader(data[:120], 8, lambda x: x / 64 - 2, shuffle=True, drop_last=True)
    held_out, test = (TensorLoader(part, 20, lambda x: x / 64 - 2) for part in (data[120:140], data[140:]))
    names = ("unstructured@0.738", "2:4", "channel@0.469")
    task = Task(
        "try", "bright or dark", lambda: CifarResNet(8, classes=2), lambda model, folder, loaders: None,
        lambda folder: Loaders(train, held_out, test), (3, 8, 8), ("dense", *names), names, patterns=names,
    )  # fmt: skip
    return Place(task, tmp_path, tmp_path)


def test_a_run_that_time_stops_is_resumed_to_the_same_row(place: Any, tmp_path: Path) -> None:
    from trained_pieces import BEFORE

    run = dataclasses.replace(BEFORE, budget=16)
    whole = run.row(place)
    assert (whole["passes"], whole["task"], whole["key"]) == (16, "try", "before--16--rate-0.01--0")
    assert whole["teacher_passes"] == 16 - whole["settings"]["given"]["dense"] > 0
    assert set(whole["accuracies"]) == set(place.task.named) and whole["accuracies"]["dense"] > 60
    json.dumps(whole)
    stopped = dataclasses.replace(place, work=tmp_path / "again", deadline=0.0)
    calls = 0
    while True:
        calls += 1
        try:
            again = run.row(stopped)
            break
        except KeyboardInterrupt:
            stopped.deadline = math.inf if calls > 1 else 0.0
    assert calls == 3
    same = ("accuracies", "passes", "teacher_passes")
    assert {k: again[k] for k in same} == {k: whole[k] for k in same} and again["cpu_seconds"] > 0


def test_runs_alone_have_the_masks_of_our_run(place: Any, tmp_path: Path) -> None:
    from trained_pieces import OURS
    from trained_runs import mask_digests

    class Stop(Exception):
        pass

    def stop(event: object) -> None:
        if type(event).__name__ == "StepDone":
            raise Stop

    run = dataclasses.replace(OURS, budget=8, options={"output": cocktail.OutputSettings(event_seconds=0)})
    trainer = run.trainer(place, tmp_path / "run", stop)
    with pytest.raises(Stop):
        trainer.fit()
    names = place.task.alone
    assert len(names) == 3 and mask_digests(trainer.net, names) == mask_digests(place.net(), names)


def test_runs_alone_have_only_their_own_accuracy(place: Any) -> None:
    from trained_runs import Alone, TorchPruned, Untrained

    start = Untrained(name="start", budget=0).row(place)
    assert start["passes"] == start["cpu_seconds"] == 0 and set(start["accuracies"]) == set(place.task.named)
    alone = Alone(name="alone", budget=6, rate=0.02, subnet="2:4").row(place)
    taught = Alone(name="alone distilled", budget=6, rate=0.02, subnet="2:4", distilled=True).row(place)
    for row_, teacher in ((alone, 0), (taught, 6)):
        assert set(row_["accuracies"]) == {"2:4"} and (row_["passes"], row_["teacher_passes"]) == (6, teacher)
        assert row_["settings"]["masks"] == {"2:4": start["settings"]["masks"]["2:4"]}
    pruned = TorchPruned(name="torch-pruning", budget=6, rate=0.02, subnet="channel@0.469").row(place)
    assert set(pruned["accuracies"]) == {"channel@0.469"}
    found = pruned["settings"]
    assert (
        found["flops"] == pytest.approx(found["flops_of_subnet"], rel=0.15) and found["flops"] < found["flops_of_dense"]
    )


def test_without_data_the_benchmark_says_so_and_is_no_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import trained

    monkeypatch.delenv("COCKTAIL_DATA", raising=False)
    monkeypatch.setattr(sys, "argv", ["trained.py"])
    assert trained.main() == 0
    assert capsys.readouterr().out.startswith("skipped: CIFAR-10 and trained weights are needed")
