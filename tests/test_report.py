"""Reports: numbers, tables, the picture, ``report.json``, and the views of a run as it goes."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console, RenderableType
from safetensors.torch import save
from tiny import TinyNet, tiny_net
from torch import nn

from cocktailsdk.errors import TrainingError
from cocktailsdk.report.figure import write_figure
from cocktailsdk.report.live import LineView, LiveView, run_view_for
from cocktailsdk.report.need import need_line, needs
from cocktailsdk.report.numbers import bytes_text, count_text, duration_text, flops_text, percent_text, shape_text
from cocktailsdk.report.progress import Progress
from cocktailsdk.report.run import NetworkRow, RunReport, dense_bytes, network_rows, read_report, versions
from cocktailsdk.report.tables import run_view
from cocktailsdk.training.events import (
    AlphaChosen,
    EpochEnded,
    Event,
    Finished,
    MergeProgress,
    MergeStarted,
    NeedMeasured,
    NetworkFinished,
    RoundEnded,
    RoundStarted,
    Saved,
    StepDone,
    TrainingStarted,
)

REPORT = RunReport(
    networks=(
        NetworkRow("dense", "dense", 0.0, 0.0, 0.99, 77_754, 1_530_000, 765_000, 0.98),
        NetworkRow("unstructured@0.2", "unstructured", 0.2, 0.20001, 0.991, 62_500, 1_530_000),
        NetworkRow("2:4", "n:m", 0.5, 0.5, 0.985, 39_610, 1_530_000),
        NetworkRow("channel@0.1", "channel", 0.1, 0.0982, 0.98, 63_580, 1_220_000),
        NetworkRow("of_mine@0.5", "of_mine", 0.5, 0.5, 0.97, 40_000, 1_530_000),
    ),
    bundle_bytes=437_500,
    dense_bytes=318_400,
    seconds=141.2,
    preset="digits",
    model="resnet8",
    seed=3,
    alphas=(0.4, 1.0),
    fingerprint="ab" * 32,
    environment={"torch": "2"},
)


def text_of(what: RenderableType, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width, markup=False, emoji=False)
    console.print(what)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (count_text(0), "0"),
        (count_text(999), "999"),
        (count_text(1_530_000), "1.53 M"),
        (count_text(235_900), "235.9 k"),
        (count_text(8.2e12), "8.20 T"),
        (flops_text(8.178e9), "8.18 GFLOPs"),
        (flops_text(12), "12 FLOPs"),
        (bytes_text(437_512), "437.5 kB"),
        (bytes_text(7_640_000), "7.6 MB"),
        (bytes_text(12), "12 B"),
        (percent_text(0.9174), "91.7 %"),
        (duration_text(54.4), "0:54"),
        (duration_text(59.6), "1:00"),
        (duration_text(3723), "1:02:03"),
        (duration_text(-1), "0:00"),
        (shape_text((64, 3, 7, 7)), "64x3x7x7"),
        (shape_text(()), "scalar"),
    ],
)
def test_numbers_as_people_read_them(text: str, wanted: str) -> None:
    assert text == wanted


@pytest.mark.parametrize("width", [60, 80, 200])
def test_the_final_table(width: int) -> None:
    text = text_of(run_view(REPORT), width)
    assert max(map(len, text.splitlines())) <= width
    words = " ".join(text.split())
    for row in REPORT.networks:
        assert f"{row.name} {row.sparsity:.3f} {row.sparsity_exact:.4f} {row.metric:.4f}" in words
    assert "437.5 kB, 1.37 x one dense checkpoint (318.4 kB), 0.275 x 5 of them (1.6 MB)" in words
    assert "2:21" in words


def test_a_report_is_read_as_it_was_written(tmp_path: Path) -> None:
    assert read_report(tmp_path) is None
    path = REPORT.write(tmp_path)
    assert read_report(tmp_path) == REPORT
    data = json.loads(path.read_text())
    assert data["bundle_bytes"] == 437_500
    assert set(data["networks"][0]) >= {"name", "pattern", "sparsity", "sparsity_exact", "metric", "params", "flops"}
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 1}', '{"format": 99, "networks": []}'])
def test_what_is_no_report_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "report.json").write_text(text)
    with pytest.raises(TrainingError, match="report.json"):
        read_report(tmp_path)


def test_rows_take_their_metrics_by_name() -> None:
    net = tiny_net(["2:4", "channel@0.5"])
    names = net.names
    rows = network_rows(net.subnets(), {n: i / 10 for i, n in enumerate(names)}, {"dense": 0.5})
    assert [r.name for r in rows] == names
    assert [r.metric for r in rows] == [0.0, 0.1, 0.2]
    assert [r.held_out for r in rows] == [0.5, None, None]
    assert [r.pattern for r in rows] == ["dense", "n:m", "channel"]


def test_dense_bytes_are_those_of_a_checkpoint() -> None:
    model = TinyNet()
    assert dense_bytes(model) == len(save(dict(model.state_dict())))
    assert dense_bytes(tiny_net(["2:4"])) == dense_bytes(model)
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    assert dense_bytes(tied) < dense_bytes(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))


def test_versions_are_words() -> None:
    found = versions()
    assert found["torch"] == str(torch.__version__)
    assert all(isinstance(v, str) for v in found.values())


def test_the_picture_is_written_and_does_not_depend_on_the_clock(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        write_figure(REPORT, tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    write_figure(replace(REPORT, networks=REPORT.networks[1:]), tmp_path / "no_dense.svg")
    assert "<svg" in (tmp_path / "no_dense.svg").read_text(encoding="utf-8")


def a_run(folder: Path) -> list[Event]:
    """The events of a small run."""
    return [
        TrainingStarted(2, 0, 2, 5, 30, 0, False),
        RoundStarted(0, (), 2),
        StepDone(0, 0, 1, 1, 30, 10.0, "dense"),
        EpochEnded(0, 0, {"dense": 0.7}, 0.1, 10.0),
        RoundEnded(0, {"dense": 0.8}),
        RoundStarted(1, ("2:4", "channel@0.5"), 2),
        StepDone(1, 1, 3, 18, 30, 6.0, "2:4"),
        Saved(folder / "state" / "state-000001.pt", True),
        RoundEnded(1, {"dense": 0.9, "2:4": 0.85}),
        MergeStarted(2, 40),
        MergeProgress(2, 0.5, 10, 40),
        AlphaChosen(2, 0.95, 0.88),
        NetworkFinished("channel@0.5", 0.7, 1, 3),
        Finished({"dense": 0.91, "2:4": 0.85, "channel@0.5": 0.7}, 12.0),
    ]


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_progress_gathers_where_a_run_stands(tmp_path: Path) -> None:
    clock = Clock()
    progress = Progress(clock)
    said = []
    for event in a_run(tmp_path):
        clock.now += 1.0
        progress.take(event)
        said.append((progress.headline(), round(progress.share, 3), progress.remaining))
    assert said[2] == ("round 0 of 2, epoch 1 of 2", round(1 / 30, 3), pytest.approx(2.9))
    assert said[6] == ("round 1 of 2, epoch 2 of 2", 0.6, pytest.approx(2.0))
    assert said[10] == ("merging round 2 of 2, 10 of 40 judged", 0.25, pytest.approx(3.0))
    assert said[12][0] == "statistics and metrics, 1 of 3 networks"
    assert said[13][:2] == ("done", 1.0)
    assert progress.metrics == {"dense": 0.91, "2:4": 0.85, "channel@0.5": 0.7}
    assert progress.alphas == {2: 0.95}
    assert progress.elapsed == 14.0


def need_measured(step: int, passes: dict[str, int]) -> NeedMeasured:
    losses = {"dense": 0.3, "2:4": 0.4, "channel@0.5": 2.2, "channel@0.25": 0.9}
    shares = {"dense": 0.2, "2:4": 0.3, "channel@0.5": 0.4, "channel@0.25": 0.1}
    return NeedMeasured(1, step, losses, shares, passes, reference=0.3)


def one_round() -> list[Event]:
    """The beginning of a run that shares passes by need."""
    return [
        TrainingStarted(1, 1, 2, 50, 100, 0, False),
        RoundStarted(1, ("2:4", "channel@0.25", "channel@0.5"), 2),
        need_measured(0, {}),
        StepDone(1, 0, 40, 40, 100, 10.0, "2:4"),
        need_measured(40, {"dense": 8, "2:4": 16, "channel@0.5": 12, "channel@0.25": 4}),
    ]


def test_the_views_say_who_got_which_passes_and_who_needs_them(tmp_path: Path) -> None:
    net = tiny_net(["2:4", "channel@0.25", "channel@0.5"])
    subnets = [net.subnet(n) for n in net.names]
    console = Console(file=io.StringIO(), width=40, markup=False, emoji=False)
    with run_view_for(console, "a run", subnets) as lines:
        for event in one_round():
            lines(event)
    assert isinstance(console.file, io.StringIO)
    said = console.file.getvalue().splitlines()
    assert "starting: 1 round, step 0 of 100" in said
    assert "step 0: passes: dense 20 %, channel 50 %, n:m 30 %; most in need: channel@0.5 (+1.9)" in said
    assert "step 40: passes: dense 20 %, n:m 40 %, channel 40 %; most in need: channel@0.5 (+1.9)" in said

    wide = Console(file=io.StringIO(), width=100, force_terminal=True, markup=False, emoji=False)
    with run_view_for(wide, "a run", subnets) as live:
        for event in one_round():
            live(event)
        assert isinstance(live, LiveView)
        picture = text_of(live.picture(), 100)
    assert "epoch 1 of 2" in picture and "round" not in picture
    assert "of training left" in picture and "merging" not in picture
    assert "passes: dense 20 %, n:m 40 %, channel 40 %; most in need: channel@0.5 (+1.9)" in picture


def test_nobody_is_in_need_where_no_loss_is_above_the_start() -> None:
    event = replace(need_measured(0, {}), reference=5.0)
    assert need_line(event, {}).startswith("passes: dense 20 %, ") and "need" not in need_line(event, {})
    unknown = replace(event, losses={**event.losses, "2:4": float("nan")}, reference=0.3)
    assert "2:4" not in needs(unknown.losses, 0.3)
    assert needs(unknown.losses, float("inf")) == {}


def test_lines_where_there_is_no_terminal(tmp_path: Path) -> None:
    clock = Clock()
    console = Console(file=io.StringIO(), width=40, markup=False, emoji=False)
    with LineView(console, "a run", every=10.0, clock=clock) as view:
        for event in a_run(tmp_path):
            view(event)
        clock.now += 11.0
        for step in range(3):  # only the first is due
            view(StepDone(1, 1, 4, 19 + step, 30, 6.0, "2:4"))
    assert isinstance(console.file, io.StringIO)
    lines = console.file.getvalue().splitlines()
    assert lines[0] == "a run"
    assert "round 1: dense, 2:4, channel@0.5, 2 epochs" in lines
    assert "round 2 merged: alpha 0.95, held-out mean 0.8800" in lines
    assert f"state saved in {tmp_path / 'state'}" in lines
    assert sum("steps/s" in line for line in lines) <= 1


def test_the_live_view_shows_the_latest_of_every_network(tmp_path: Path) -> None:
    net = tiny_net(["2:4", "channel@0.5"])
    console = Console(file=io.StringIO(), width=80, force_terminal=True, markup=False, emoji=False)
    view = run_view_for(console, "digits · 3 networks", [net.subnet(n) for n in net.names])
    assert isinstance(view, LiveView)
    seen = []
    with view:
        for event in a_run(tmp_path):
            view(event)
            seen.append(text_of(view.picture()))
    assert "round 0 of 2, epoch 2 of 2" in seen[3]
    assert "0.7000" in seen[3]
    assert "loss" in seen[3]
    assert "6.0 steps/s" in seen[6]
    assert "step 18 of 30" in seen[6]
    assert "held out" in seen[8]
    assert "0.8500" in seen[8]
    assert "·" in seen[8]
    assert "alpha 0.95" in seen[11]
    assert all(len(line) <= 80 for picture in seen for line in picture.splitlines())
    assert isinstance(run_view_for(Console(file=io.StringIO()), "", []), LineView)
