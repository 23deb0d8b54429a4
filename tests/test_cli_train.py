"""``train``, ``subnets`` and ``eval`` on a digits run that is small enough for a test."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner, Result

from cocktailsdk import EvaluationSettings, RoundSettings, presets
from cocktailsdk.cli.main import app
from cocktailsdk.cli.runs import _threads
from cocktailsdk.patterns import NM, Channel, Unstructured
from cocktailsdk.presets import Preset, digits, get_preset
from cocktailsdk.presets.base import Loaders
from cocktailsdk.report.run import read_report

pytestmark = pytest.mark.slow

NAMES = ["dense", "unstructured@0.5", "unstructured@0.8", "2:4", "channel@0.25", "channel@0.5"]


def small(*, weights: Path | None = None, recipe: str | None = None) -> Preset:
    # from scratch the paper's, whose runs merge: there is more to show
    preset = digits.preset(weights=weights, recipe=recipe or ("paper" if weights is None else None))
    patterns = (Unstructured(sparsities=[0.5, 0.8]), NM(2, 4), Channel(sparsities=[0.25, 0.5], round_to=1))
    training = {**preset.training, "epochs": 2, "rounds": RoundSettings(rewind_epoch=1)}
    training["evaluation"] = EvaluationSettings(recalibration_batches=2)
    return dataclasses.replace(preset, patterns=patterns, training=training)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "80"})


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    folder = tmp_path_factory.mktemp("runs") / "digits"
    board = ["--tensorboard", str(folder.parent / "board")] if importlib.util.find_spec("tensorboard") else []
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(presets.PRESETS, "digits", small)
        return folder, run("train", "--preset", "digits", "--out", str(folder), *board)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(presets.PRESETS, "digits", small)


def test_a_run_ends_with_its_table_and_files(finished: tuple[Path, Result]) -> None:
    folder, done = finished
    assert done.exit_code == 0, done.output
    for name in NAMES:
        assert name in done.stdout
    assert "x one dense checkpoint" in done.stdout
    assert "x 6 of them" in " ".join(done.stdout.split())
    assert max(map(len, done.stdout.splitlines()[:-1])) <= 80
    assert (folder / "networks.png").read_bytes().startswith(b"\x89PNG")
    report = json.loads((folder / "report.json").read_text())
    assert [n["name"] for n in report["networks"]] == NAMES
    for network in report["networks"]:
        assert {"name", "pattern", "sparsity", "sparsity_exact", "metric", "params", "flops"} <= network.keys()
        assert network["pattern"] in {"dense", "unstructured", "n:m", "channel"}
        assert 0.2 < network["metric"] <= 1
    assert report["bundle_bytes"] == sum(f.stat().st_size for f in (folder / "bundle").iterdir())
    assert 0 < report["dense_bytes"] < report["bundle_bytes"]
    assert report["seconds"] > 0


def test_without_matplotlib_it_trains_all_the_same_and_says_what_draws_the_picture(
    finished: tuple[Path, Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *more: None if n == "matplotlib" else find(n, *more))
    shutil.copytree(finished[0] / "state", tmp_path / "run" / "state")  # all that is left to do is to report
    done = run("train", "--preset", "digits", "--out", str(tmp_path / "run"))
    assert done.exit_code == 0, done.output
    said = 'networks.png is left out: drawing the picture needs matplotlib, which is not installed: pip install "'
    assert f'{said}cocktailsdk[plots]"' in done.stderr
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["bundle", "report.json", "state"]
    assert "networks.png" not in done.stdout and "bundle/, report.json\n" in done.stdout


def test_its_report_has_all_that_there_is_to_show(finished: tuple[Path, Result], tmp_path: Path) -> None:
    folder, _ = finished
    done = run("report", str(folder), "--html", str(tmp_path / "page.html"), "--json")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)["runs"][0]["report"]
    assert set(told["masks"]["bytes"]) == set(NAMES)
    assert [c["round"] for c in told["history"]["curves"]] == [2]
    assert told["environment"]["command"] == "cocktail-cli train --preset digits"
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "made by an earlier release" not in page
    assert all(f"{folder} {name} " in page for name in NAMES)


def test_scalars_are_written_as_the_run_goes(finished: tuple[Path, Result]) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    report = read_report(finished[0])
    assert report is not None
    board = EventAccumulator(str(finished[0].parent / "board")).Reload()
    for row in report.networks:  # the finished bundle's comes one after the last round
        last = board.Scalars(f"held_out/{row.name}")[-1]
        assert (last.step, last.value) == (3, pytest.approx(row.held_out))
        assert f"loss/{row.name}" in board.Tags()["scalars"]
    assert [(s.step, s.value) for s in board.Scalars("alpha")] == [(2, pytest.approx(report.alphas[0]))]


def test_progress_goes_to_stderr_in_lines(finished: tuple[Path, Result]) -> None:
    _, done = finished
    assert "round 0: dense" in done.stderr
    assert "round 2 merged: alpha" in done.stderr
    assert "round" not in done.stdout


def test_the_same_command_prints_a_finished_run_again(finished: tuple[Path, Result]) -> None:
    folder, first = finished
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}
    again = run("train", "--preset", "digits", "--out", str(folder))
    assert again.exit_code == 0
    assert again.stdout == first.stdout
    assert "finished" in again.stderr
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()} == before
    as_json = run("train", "--preset", "digits", "--out", str(folder), "--json")
    assert json.loads(as_json.stdout) == json.loads((folder / "report.json").read_text())


def test_another_configuration_in_the_same_folder_touches_nothing(finished: tuple[Path, Result]) -> None:
    folder, _ = finished
    before = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.rglob("*") if p.is_file()}
    done = run("train", "--preset", "digits", "--out", str(folder), "--seed", "77")
    assert done.exit_code == 1
    assert "another configuration" in done.stderr
    assert "seed" in done.stderr
    assert {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.rglob("*") if p.is_file()} == before


def test_a_lost_bundle_is_made_again_from_the_state(finished: tuple[Path, Result], tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(finished[0], folder)
    shutil.rmtree(folder / "bundle")
    report = read_report(folder)
    assert run("train", "--preset", "digits", "--out", str(folder)).exit_code == 0
    for file in (finished[0] / "bundle").iterdir():
        assert file.read_bytes() == (folder / "bundle" / file.name).read_bytes()
    assert read_report(folder) == report


def test_a_bundle_says_how_it_was_made_and_names_no_path(finished: tuple[Path, Result]) -> None:
    folder, _ = finished
    text = (folder / "bundle" / "bundle.json").read_text()
    provenance = json.loads(text)["provenance"]
    assert provenance["command"] == "cocktail-cli train --preset digits"
    assert provenance["data"] == "digits"
    assert provenance["training"]["training"]["seed"] == 0
    assert provenance["training"]["fingerprint"] == json.loads((folder / "report.json").read_text())["fingerprint"]
    assert set(provenance["versions"]) == {"cocktailsdk", "python", "torch"}
    assert str(folder) not in text


def test_subnets_lists_a_bundle_without_building_a_model(finished: tuple[Path, Result]) -> None:
    folder, _ = finished
    for path in (folder, folder / "bundle"):
        done = run("subnets", str(path))
        assert done.exit_code == 0, done.output
        assert all(name in done.stdout for name in NAMES)
    listed = json.loads(run("subnets", str(folder), "--json").stdout)
    assert [s["name"] for s in listed["subnets"]] == NAMES
    program = (
        "import sys\n"
        "from cocktailsdk.cli.main import main\n"
        "try:\n"
        "    main()\n"
        "finally:\n"
        "    assert 'torch' not in sys.modules\n"
    )
    assert subprocess.run([sys.executable, "-c", program, "subnets", str(folder)], check=False).returncode == 0


def test_a_score_is_in_the_bundle_the_report_and_the_list_of_subnets(tmp_path: Path) -> None:
    command = ("train", "--preset", "digits", "--score", "wanda", "--score", "channel=activation")
    done = run(*command, "--recipe", "cocktail", "--out", str(tmp_path))
    assert done.exit_code == 0, done.output
    provenance = json.loads((tmp_path / "bundle" / "bundle.json").read_text())["provenance"]
    assert provenance["score"]["patterns"] == {"unstructured": "wanda", "n:m": "wanda", "channel": "activation"}
    assert provenance["score"]["calibration"]["examples"] == 128
    assert provenance["command"].endswith("--recipe cocktail --score wanda --score channel=activation")
    report = read_report(tmp_path)
    assert report is not None and report.score == provenance["score"]
    assert report.configuration["training"]["score"] == provenance["score"]["patterns"]
    assert "ranked by wanda (unstructured, n:m), activation (channel)" in " ".join(
        run("subnets", str(tmp_path)).stdout.split()
    )
    assert json.loads(run("subnets", str(tmp_path), "--json").stdout)["score"] == provenance["score"]
    again = run("train", "--preset", "digits", "--recipe", "cocktail", "--out", str(tmp_path))
    assert again.exit_code == 1 and "training.score" in again.stderr


def test_eval_measures_what_training_reported(finished: tuple[Path, Result]) -> None:
    folder, _ = finished
    report = read_report(folder)
    assert report is not None
    done = run("eval", str(folder), "--json")
    assert done.exit_code == 0, done.output
    measured = json.loads(done.stdout)["networks"]
    assert {r["name"]: r["metric"] for r in measured} == {r.name: r.metric for r in report.networks}
    some = run("eval", str(folder / "bundle"), "2:4", "channel@0.250")
    assert some.exit_code == 0, some.output
    assert "channel@0.25" in some.stdout
    assert "unstructured" not in some.stdout
    wrong = run("eval", str(folder), "chanel@0.25")
    assert wrong.exit_code == 1
    assert "channel@0.25" in wrong.stderr


def test_a_bundle_alone_needs_its_preset_named(finished: tuple[Path, Result], tmp_path: Path) -> None:
    shutil.copytree(finished[0] / "bundle", tmp_path / "bundle")
    assert run("eval", str(tmp_path / "bundle")).exit_code == 2
    assert run("eval", str(tmp_path / "bundle"), "2:4", "--preset", "digits").exit_code == 0


def test_a_damaged_bundle_is_named(finished: tuple[Path, Result], tmp_path: Path) -> None:
    shutil.copytree(finished[0] / "bundle", tmp_path / "bundle")
    file = tmp_path / "bundle" / "bundle.json"
    file.write_bytes(file.read_bytes()[:-10])
    done = run("subnets", str(tmp_path))
    assert done.exit_code == 1
    assert "bundle.json" in done.stderr
    (tmp_path / "report.json").write_text("{}")
    assert run("eval", str(tmp_path)).exit_code == 1


def test_trained_weights_are_taken_from_a_file_and_passes_are_shown(
    finished: tuple[Path, Result], tmp_path: Path
) -> None:
    weights, folder = tmp_path / "dense.safetensors", tmp_path / "run"
    assert run("export", str(finished[0]), "dense", str(weights)).exit_code == 0
    done = run("train", "--preset", "digits", "--weights", str(weights), "--out", str(folder))
    assert done.exit_code == 0, done.output
    assert "starting: 1 round, step 0 of 38" in done.stderr
    assert "step 0: passes: dense 18 %, channel 40 %, unstructured 24 %, n:m 18 %" in done.stderr
    assert "before training" in done.stdout and "passes" in done.stdout
    assert max(map(len, done.stdout.splitlines()[:-1])) <= 80
    report = read_report(folder)
    assert report is not None
    assert report.configuration["training"]["recipe"]["name"] == "pretrained"
    assert report.environment["command"] == "cocktail-cli train --preset digits --weights dense.safetensors"
    assert sum(report.passes.values()) == 38
    again = run("train", "--preset", "digits", "--weights", str(weights), "--out", str(folder))
    assert (again.exit_code, again.stdout) == (0, done.stdout)
    other = run("train", "--preset", "digits", "--weights", str(weights), "--recipe", "paper", "--out", str(folder))
    assert other.exit_code == 1
    assert "another configuration" in other.stderr


@pytest.mark.skipif(os.name == "nt", reason="signals are sent otherwise there")
def test_ctrl_c_saves_and_the_same_command_goes_on(finished: tuple[Path, Result], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    program = (
        "import test_cli_train, sys\n"
        "from cocktailsdk import presets\n"
        "presets.PRESETS['digits'] = test_cli_train.small\n"
        "from cocktailsdk.cli.main import main\n"
        "main()\n"
    )
    command = [sys.executable, "-c", program, "train", "--preset", "digits", "--out", str(folder)]
    folders = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(folders)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    assert process.stderr is not None
    said = ""
    for line in process.stderr:
        said += line
        if "round 1: dense" in line:
            process.send_signal(signal.SIGINT)
            break
    out, rest = process.communicate(timeout=400)  # on a busy machine
    assert process.returncode == 130, said + rest
    assert out == ""
    assert "the same command resumes" in rest
    assert "Traceback" not in rest
    assert not (folder / "report.json").exists()
    done = run("train", "--preset", "digits", "--out", str(folder))
    assert done.exit_code == 0, done.output
    assert "going on" in done.stderr
    whole, resumed = read_report(finished[0]), read_report(folder)
    assert whole is not None
    assert resumed is not None
    assert resumed.networks == whole.networks


@pytest.mark.skipif(os.name == "nt", reason="signals are sent otherwise there")
def test_sigterm_saves_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(path: Path | None) -> Loaders:
        loaders = small().load(path)
        loaders.train.transform = terminating(loaders.train.transform)
        return loaders

    calls = [0]

    def terminating(augment: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def act(images: Tensor) -> Tensor:
            calls[0] += 1
            if calls[0] == 10:
                os.kill(os.getpid(), signal.SIGTERM)
            return augment(images)

        return act

    monkeypatch.setitem(presets.PRESETS, "digits", lambda: dataclasses.replace(small(), load=load))
    folder = tmp_path / "run"
    done = run("train", "--preset", "digits", "--out", str(folder))
    assert done.exit_code == 143, done.output
    assert "SIGTERM: finishing the current step and saving" in done.stderr
    assert "stopped; the same command resumes from the state in" in done.stderr
    assert calls[0] <= 12


def test_a_tiny_preset_shares_no_layers_among_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with _threads(get_preset("digits").threads):
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 2
        monkeypatch.setenv("OMP_NUM_THREADS", "2")
        with _threads(1):
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
