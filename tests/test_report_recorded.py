"""What a run keeps for its report is what the run was; TensorBoard gets the same numbers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_net
from training_tiny import tiny_trainer

from cocktailsdk.errors import TrainingError
from cocktailsdk.report.page import ReportedRun, report_page
from cocktailsdk.report.recorded import _rounded, mask_record, recorded
from cocktailsdk.report.run import RunReport, network_rows, read_report


def masks_of(net: Any, name: str) -> dict[str, torch.Tensor]:
    """Every weight's mask in its shape, True where kept."""
    kept = net.masks[name].tensors(net.coupling)
    whole = {w.name: torch.ones(w.shape, dtype=torch.bool) for w in net.coupling.weights}
    return {n: (m & kept[n] if n in kept else m) for n, m in whole.items()}


def test_masks_are_recorded_as_they_are() -> None:
    net = tiny_net(["unstructured@0.5", "2:4", "channel@0.25", "channel@0.5+2:4"])
    found = mask_record(net)
    names = found["names"]
    assert names == [n for n in net.names if n != "dense"]
    assert json.loads(json.dumps(found)) == found
    assert [layer["name"] for layer in found["layers"]] == [w.name for w in net.coupling.weights]
    for name in names:
        wanted = [1 - float(m.double().mean()) for m in masks_of(net, name).values()]
        assert found["sparsity"][name] == pytest.approx(wanted, abs=1e-6)
    eligible = [w.name for w in net.eligible]
    for i, a in enumerate(names):
        for j, b in enumerate(names):
            one, other = (torch.cat([masks_of(net, n)[w].flatten() for w in eligible]) for n in (a, b))
            jaccard = float((one & other).sum()) / float((one | other).sum())
            assert found["overlap"][i][j] == pytest.approx(jaccard, abs=1e-6)
            assert found["chance"][i][j] == found["chance"][j][i]
        assert found["chance"][i][i] == 1


def test_bytes_are_those_of_what_is_left_and_of_the_masks() -> None:
    net = tiny_net(["2:4", "channel@0.5", "channel@0.5+2:4"])
    size = mask_record(net)["bytes"]
    tensors = [*net.model.parameters(), *net.model.buffers()]
    assert size["dense"] == sum(t.numel() * t.element_size() for t in tensors)
    masked = sum(m.numel() for m in net.masks["2:4"].elements.values())
    zeros = sum(int((~m).sum()) for m in net.masks["2:4"].elements.values())
    assert size["2:4"] == size["dense"] - 4 * zeros + -(-masked // 8)
    slim = sum(
        t.numel() * t.element_size() if name not in net.masks["channel@0.5"].tensors(net.coupling)
        else int(net.masks["channel@0.5"].tensors(net.coupling)[name].expand(t.shape).sum()) * t.element_size()
        for name, t in [*net.model.named_parameters(), *net.model.named_buffers()]
    )  # fmt: skip
    assert size["channel@0.5"] == slim
    assert size["channel@0.5+2:4"] < size["channel@0.5"] < size["dense"]


def test_numbers_that_json_lacks_are_left_out() -> None:
    assert _rounded({"a": [float("nan"), float("inf"), 0.123456789], "b": (1, "x")}) == {
        "a": [None, None, 0.123457],
        "b": [1, "x"],
    }


@pytest.mark.slow
def test_a_run_is_recorded_shown_and_written_for_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from cocktailsdk.report.tensorboard import TensorBoard

    with TensorBoard(tmp_path / "board") as board:
        trainer = tiny_trainer(callbacks=[board])
        net = trainer.fit()
    told = recorded(net, trainer)
    history = told["history"]
    assert history["alphas"] == trainer.history.alphas
    assert [c["round"] for c in history["curves"]] == [2, 3]
    assert {p["alpha"] for p in history["curves"][0]["points"]} == {1.0, 0.7, 0.4}
    assert "weights" not in history
    assert {k["what"] for k in told["kept"]} == {"weights", "channels"}
    rows = network_rows(net.subnets(), dict.fromkeys(net.names, 0.5), net.metrics)
    report = RunReport(rows, 10, 10, 1.0, alphas=tuple(history["alphas"]), **told)
    report.write(tmp_path)
    again = read_report(tmp_path)
    assert again is not None
    assert replace(again, kept=()) == replace(report, kept=())
    assert list(again.kept) == list(report.kept)
    page = report_page([ReportedRun(again, tmp_path)])
    assert "conv1" in page
    assert "made by an earlier release" not in page

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(tmp_path / "board")).Reload()
    assert [round(s.value, 5) for s in found.Scalars("alpha")] == [round(a, 5) for a in trainer.history.alphas]
    last = found.Scalars("held_out/1:2")[-1]
    assert (last.step, last.value) == (4, pytest.approx(net.metrics["1:2"]))
    rounds = trainer.history.rounds
    losses = [epoch["dense"] for record in rounds for epoch in record.losses if "dense" in epoch]
    assert [s.value for s in found.Scalars("loss/dense")] == pytest.approx(losses)
    steps = [s.step for s in found.Scalars("learning_rate")]
    assert steps == sorted(set(steps))


def test_a_run_from_trained_weights_records_its_passes_and_needs(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from cocktailsdk.report.tensorboard import TensorBoard

    with TensorBoard(tmp_path / "board") as board:
        trainer = tiny_trainer(
            recipe="pretrained", start="pretrained", rewind_epoch=None, epochs=None, total_steps=40, callbacks=[board]
        )
        net = trainer.fit()
    rows = network_rows(net.subnets(), dict.fromkeys(net.names, 0.5), net.metrics)
    RunReport(rows, 10, 10, 1.0, **recorded(net, trainer)).write(tmp_path)
    report = read_report(tmp_path)
    assert report is not None
    assert set(report.passes) == set(net.names)
    assert sum(report.passes.values()) == 40
    assert report.dense_before == pytest.approx(trainer.history.before["dense"], rel=1e-5)
    page = report_page([ReportedRun(report, tmp_path)])
    assert "Measured need by step" in page

    found = EventAccumulator(str(tmp_path / "board")).Reload()
    measured = trainer.history.measured
    reference = measured[0]["losses"]["dense"]
    for name in net.names:
        assert [s.step for s in found.Scalars(f"need/{name}")] == [one["step"] for one in measured]
        gaps = [one["losses"][name] - reference for one in measured]
        assert [s.value for s in found.Scalars(f"need/{name}")] == pytest.approx(gaps, abs=1e-6)


def test_without_tensorboard_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from cocktailsdk.report.tensorboard import TensorBoard

    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(TrainingError, match=r"cocktailsdk\[tensorboard\]"):
        TensorBoard("nowhere")
