"""Every wrong command line ends in one line that names what is wrong, and leaves nothing behind."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from typer.main import get_command
from typer.testing import CliRunner, Result

import cocktailsdk as cocktail
from cocktailsdk.choosing import read_profile
from cocktailsdk.cli import checks
from cocktailsdk.cli.group import PIPE_CLOSED
from cocktailsdk.cli.main import app
from cocktailsdk.cli.options import RECIPES, SCORES
from cocktailsdk.exporting.formats import FORMATS
from cocktailsdk.patterns.scores import registered_scores
from cocktailsdk.presets import PRESETS
from cocktailsdk.presets.images import MODELS
from cocktailsdk.presets.weights import SUFFIXES
from cocktailsdk.training.recipes import recipes
from cocktailsdk.utils.devices import available_device
from cocktailsdk.utils.nearest import nearest_subnets

COMMANDS: dict[str, Any] = get_command(app).commands  # type: ignore[attr-defined]
MODEL = """
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))

class Weights:
    pass

def broken():
    raise RuntimeError("two lines\\nof words")
"""


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a bundle, a model of the user's, and things that are neither."""
    home = tmp_path_factory.mktemp("errors")
    (home / "users_model.py").write_text(MODEL)
    net = cocktail.sparsify(build(), ["unstructured", "2:4", "channel"], example_inputs=(torch.randn(1, 16),))
    net.save_pretrained(home / "bundle")
    (home / "file.txt").write_text("words")
    (home / "bad.pth").write_bytes(b"words that are no checkpoint")
    (home / "bad.safetensors").write_bytes(b"words that are no checkpoint")
    (home / "code.pth").write_bytes(b"\x80\x02cusers_model\nWeights\n)\x81.")  # a pickle that makes a Weights()
    torch.save(build().state_dict(), home / "other.pt")
    (home / "empty").mkdir()
    (home / "link").symlink_to("nowhere")
    (home / "damaged").mkdir()
    (home / "damaged" / "bundle.json").write_text('{"format": ')
    return home


@pytest.fixture(autouse=True)
def here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.delitem(sys.modules, "users_model", raising=False)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "80", "NO_COLOR": "1"})


def refused(*arguments: str) -> str:
    """The one line with which a command line is refused."""
    before = {p for p in Path().rglob("*") if "__pycache__" not in p.parts}
    done = run(*arguments)
    assert done.exit_code in (1, 2), (arguments, done.output, done.exception)
    assert done.exception is None or isinstance(done.exception, SystemExit), (arguments, done.exception)
    lines = done.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), (arguments, done.stderr)
    assert len(lines[0]) <= 320 and "Traceback" not in lines[0]
    assert not done.stdout, (arguments, done.stdout)
    assert {p for p in Path().rglob("*") if "__pycache__" not in p.parts} == before
    return lines[0]


BUNDLE = ("bundle", "--model", "users_model:build")
WRONG: list[tuple[tuple[str, ...], str]] = [
    (("trian",), "trian"),
    (("train", "--preset", "digits", "--device", "gpu"), "--device 'gpu'"),
    (("train", "--preset", "digits", "--device", "cuda:99"), "--device cuda:99"),
    (("train", "--preset", "digits", "--device", "meta"), "--device meta"),
    (("train", "--preset", "digits", "--out", ""), "--out"),
    (("train", "--preset", "digits", "--out", "file.txt"), "--out file.txt is a file"),
    (("train", "--preset", "digits", "--out", "file.txt/run"), "file.txt"),
    (("train", "--preset", "digits", "--out", "x" * 400), "--out"),
    (("train", "--preset", "digits", "--tensorboard", "file.txt"), "--tensorboard"),
    (("train", "--preset", "digits", "--epochs-scale", "0.5"), "--epochs-scale"),
    (("train", "--preset", "digits", "--data", "empty"), "--data"),
    (("train", "--preset", "cifar10", "--data", "nowhere"), "--data nowhere"),
    (("train", "--preset", "cifar10", "--data", "empty", "--epochs-scale", "nan"), "--epochs-scale"),
    (("train", "--preset", "cifar10", "--data", "empty", "--model", "resnet21"), "resnet21"),
    (("train", "--preset", "cifar10", "--data", "empty", "--weights", "none.safetensors"), "--weights"),
    (("train", "--preset", "digits", "--weights", "file.txt"), ".safetensors, .pth, .pt"),
    (("train", "--preset", "digits", "--weights", "bad.pth"), "bad.pth cannot be read as a PyTorch checkpoint"),
    (("train", "--preset", "digits", "--weights", "code.pth"), "users_model.Weights"),
    (("train", "--preset", "digits", "--weights", "other.pt"), "other.pt does not hold the weights of resnet8"),
    (("train", "--preset", "digits", "--weights", "bad.safetensors"), "bad.safetensors cannot be read"),
    (("train", "--preset", "digits", "--recipe", "pretraned"), "did you mean 'pretrained'?"),
    (("train", "--preset", "digits", "--recipe", "pretrained"), "give --weights FILE"),
    (("train", "--preset", "digits", "--recipe", "imp"), "recipe 'imp' trains one pattern"),
    (("train", "--preset", "digits", "--seed", "-1"), "--seed"),
    (("train", "--preset", "digits", "--seed", "9" * 30), "--seed"),
    (("inspect", "users_model:build", "--json", "--groups"), "--groups"),
    (("inspect", "users_model:build", "--full", "--why", "0"), "--full"),
    (("inspect", "users_model:build", "--groups", "--group", "0"), "--group"),
    (("inspect", "users_model:build", "--svg", "empty"), "--svg empty"),
    (("inspect", "users_model:build", "--svg", "graph.png"), "graph.svg"),
    (("inspect", "users_model:build", "--svg", "link"), "--svg link is a link to nothing"),
    (("inspect", "users_model:build", "--input-size", "3,,4"), "3,,4"),
    (("inspect", "users_model:build", "--input-size", ""), "--input-size"),
    (("train", "--preset", "digits", "--out", "link"), "--out link is a link to nothing"),
    (("export", *BUNDLE, "2:4", "net.onnx", "--int8", "--data", "empty"), "--data empty"),
    (("inspect", "users_model:build", "--input-size", "100000,100000,100000"), "--input-size"),
    (("inspect", "users_model:build", "--why", "nothing"), "nothing"),
    (("inspect", "users_model:broken"), "RuntimeError"),
    (("inspect", "users_model:biuld"), "build"),
    (("inspect", "no_such_model:build"), "no_such_model"),
    (("inspect", "hf:bert", "--input-size", "3,224,224"), "--input-size 3,224,224"),
    (("subnets", "empty"), "empty"),
    (("subnets", "file.txt"), "file.txt"),
    (("subnets", "damaged"), "damaged"),
    (("eval", "bundle"), "--preset"),
    (("eval", "bundle", "--preset", "digit"), "digits"),
    (("eval", "bundle", "--preset", "digits", "--model", "resnet20"), "--model"),
    (("eval", "bundle", "unstructured@0.5", "--preset", "digits"), "unstructured@0.488"),
    (("bench", *BUNDLE, "--threads", "0"), "--threads"),
    (("bench", *BUNDLE, "--repeats", "-3"), "--repeats"),
    (("bench", *BUNDLE, "--batch", "none"), "--batch"),
    (("bench", *BUNDLE, "--out", "empty"), "--out empty"),
    (("bench", *BUNDLE, "--device", "mps:9"), "mps:9"),
    (("bench", *BUNDLE, "--runtime", "tensorrt"), "--runtime"),
    (("bench", *BUNDLE, "channel@0.47"), "channel@0.469"),
    (("export", *BUNDLE, "chanel@0.47", "net.pt2"), "channel@0.469"),
    (("export", *BUNDLE, "2:4", "net"), "suffix"),
    (("export", *BUNDLE, "2:4", "empty.pt2/net.txt"), ".txt"),
    (("export", *BUNDLE, "2:4", "file.txt/net.pt2"), "file.txt"),
    (("export", *BUNDLE, "2:4", "net.pt2", "--int8"), "--int8"),
    (("export", *BUNDLE, "2:4", "net.safetensors", "--fixed-batch"), "--fixed-batch"),
    (("export", *BUNDLE, "2:4", "net.pt2", "--data", "empty"), "--data"),
    (("report",), "RUN"),
    (("report", "nowhere"), "nowhere"),
    (("report", "empty", "--profile", "nothing.json"), "--profile nothing.json"),
    (("report", "empty", "--html", "empty"), "--html empty"),
    (("report", "empty", "--compare", "empty", "empty"), "RUN"),
    (("report", "empty", "--figures", "file.txt"), "--figures"),
]


@pytest.mark.parametrize(("arguments", "named"), WRONG, ids=[" ".join(a)[:60] for a, _ in WRONG])
def test_a_wrong_command_line_is_refused_in_one_line_that_names_it(arguments: tuple[str, ...], named: str) -> None:
    assert named in refused(*arguments)


BASE = {
    "train": ("--preset", "digits", "--device", "gpu"),
    "inspect": ("users_model:build",),
    "subnets": ("bundle",),
    "eval": ("bundle", "--preset", "nothing"),
    "bench": (*BUNDLE, "--threads", "0"),
    "export": (*BUNDLE, "2:4", "net.txt"),
    "report": ("empty",),
}
"""A command line for each command; all but those of inspect and subnets are wrong already."""


NUMBERS = ("batch", "repeats", "threads", "seed", "epochs_scale")


@st.composite
def wrong_lines(draw: st.DrawFn) -> tuple[str, tuple[str, ...]]:
    """A command line with at least one option of the command that cannot be."""
    name = draw(st.sampled_from(sorted(COMMANDS)))
    options = [p for p in COMMANDS[name].params if p.param_type_name == "option" and p.name != "help"]
    wrong: list[str] = []
    for option in draw(st.lists(st.sampled_from(options), min_size=1, max_size=3)):
        flag = draw(st.sampled_from(option.opts))
        if option.is_flag:
            wrong.append(f"{flag}=5")
        elif option.name in NUMBERS:
            wrong += [flag, draw(st.sampled_from(["seven", "-5", "nan", "", "1,5", "0x10"]))]
        elif option.name == "compare":
            wrong += [flag, "empty"]
        else:
            wrong += [flag, draw(st.sampled_from(["", "\0", "file.txt/below/it"]))]
    if draw(st.booleans()):
        wrong.insert(0, draw(st.sampled_from(["--no-such-option", "--", "-x"])))
    return name, tuple(wrong)


@settings(deadline=None, derandomize=True, max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(wrong_lines())
def test_any_option_with_a_value_that_cannot_be_is_refused_in_one_line(line: tuple[str, tuple[str, ...]]) -> None:
    name, wrong = line
    refused(name, *BASE[name], *wrong)


def test_what_is_checked_before_torch_is_what_is_there() -> None:
    assert set(checks.SETTINGS) == set(PRESETS)
    for name, make in PRESETS.items():
        assert set(checks.SETTINGS[name]) == set(make.__kwdefaults__ or {})
    assert set(checks.MODELS) == set(MODELS)
    assert checks.WEIGHTS == SUFFIXES
    assert {*RECIPES} == {name for name, recipe in recipes().items() if recipe.takes == "any" and not recipe.only}
    assert {*RECIPES, *checks.OTHER_RECIPES} == set(recipes())
    ours = {name: score for name, score in registered_scores().items() if score.__module__.startswith("cocktailsdk.")}
    assert {*SCORES} == {name for name, score in ours.items() if score.scores_elements() or score.scores_units()}
    assert {suffix: (tuple(k.packages), k.extra) for suffix, k in FORMATS.items()} == checks.FORMATS
    assert available_device("cpu").type == "cpu"


@pytest.mark.parametrize(
    ("arguments", "packages", "extra"),
    [
        (("export", *BUNDLE, "2:4", "net.onnx"), ("onnx", "onnxscript"), "onnx"),
        (("export", *BUNDLE, "2:4", "net.xml"), ("openvino",), "openvino"),
        (("bench", *BUNDLE, "--runtime", "onnxruntime"), ("onnxruntime",), "onnx"),
        (("bench", *BUNDLE, "--runtime", "openvino"), ("openvino",), "openvino"),
        (("train", "--preset", "digits", "--tensorboard", "board"), ("tensorboard",), "tensorboard"),
        (("train", "--preset", "digits"), ("sklearn",), "presets"),
        (("report", "empty"), ("matplotlib",), "plots"),
    ],
)
def test_a_missing_extra_is_named_with_what_to_type(
    arguments: tuple[str, ...], packages: tuple[str, ...], extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    hidden = lambda name, *more: None if name in packages else find(name, *more)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", hidden)
    said = refused(*arguments)
    assert f'pip install "cocktailsdk[{extra}]"' in said and packages[0] in said


def test_a_score_is_one_for_all_patterns_or_by_pattern() -> None:
    assert checks.check_score([]) is None
    assert checks.check_score(["wanda"]) == "wanda"
    assert checks.check_score(["wanda", "channel=activation"]) == {"*": "wanda", "channel": "activation"}
    assert checks.check_score(["n:m=taylor"]) == {"n:m": "taylor"}
    train = ("train", "--preset", "digits")
    assert "did you mean 'wanda'" in refused(*train, "--score", "wander")
    assert "twice for all patterns" in refused(*train, "--score", "wanda", "--score", "taylor")
    assert "twice for pattern 'channel'" in refused(*train, *("--score", "channel=wanda") * 2)


def test_names_are_not_printed_raw() -> None:
    said = refused("export", *BUNDLE, "evil\x1b[2Jname", "net.pt2")
    assert "\x1b" not in said and "evil" in said


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read and write everything")
def test_folders_without_permission_are_refused(folder: Path) -> None:
    locked = folder / "locked"
    locked.mkdir(mode=0o500)
    assert "locked" in refused("train", "--preset", "digits", "--out", "locked/run")


def test_an_error_that_nobody_expected_keeps_its_traceback_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cocktailsdk.bundle.files.read_meta", lambda folder: 1 / 0)
    assert "ZeroDivisionError" in refused("subnets", "bundle")
    done = CliRunner().invoke(app, ["subnets", "bundle"], env={"COCKTAIL_TRACEBACK": "1"})
    assert isinstance(done.exception, ZeroDivisionError)


def process(*arguments: str, **options: Any) -> subprocess.Popen[str]:
    program = "from cocktailsdk.cli.main import main; main()"
    command = [sys.executable, "-c", program, *arguments]
    environment = {**os.environ, **options.pop("env", {})}
    return subprocess.Popen(command, text=True, errors="replace", stderr=subprocess.PIPE, env=environment, **options)


def test_a_reader_that_closes_the_pipe_ends_the_command_quietly() -> None:
    read, write = os.pipe()
    os.close(read)
    for arguments in (("subnets", "bundle"), ("subnets", "bundle", "--json")):
        done = process(*arguments, stdout=write)
        said = done.communicate(timeout=120)[1]
        assert said == "" and done.returncode in (1, PIPE_CLOSED), said
    os.close(write)


def test_a_terminal_that_knows_few_characters_gets_others() -> None:
    for encoding in ("ascii", "latin-1", "cp1252"):
        done = process("subnets", "bundle", stdout=subprocess.PIPE, env={"PYTHONIOENCODING": encoding})
        out, said = done.communicate(timeout=120)
        assert done.returncode == 0 and said == "" and "channel@0.469" in out, said


def test_ctrl_c_in_any_command_ends_with_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(folder: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("cocktailsdk.bundle.files.read_meta", interrupted)
    done = run("subnets", "bundle")
    assert done.exit_code == 130 and done.stderr == ""


@pytest.mark.parametrize(
    ("asked", "first"),
    [
        ("unstructured@0.5", "unstructured@0.488"),
        ("unstructured@0.86", "unstructured@0.866"),
        ("unstructured@50%", "unstructured@0.488"),
        ("unstructured0.5", "unstructured@0.488"),
        ("Unstructured@0.5", "unstructured@0.488"),
        ("chanel@0.47", "channel@0.469"),
        ("channel@0.5+2:5", "channel@0.5+2:4"),
        ("channel", "channel@0.1"),
        ("2:5", "2:4"),
        ("1:3", "1:4"),
        ("transposable2:5", "transposable2:4"),
        ("block@0.5", "unstructured@0.488"),
        ("dens", "dense"),
        ("unstructured@nan", "unstructured@0.2"),
    ],
)
def test_the_nearest_names_are_those_of_the_nearest_values(asked: str, first: str) -> None:
    levels = [0.2, 0.36, 0.488, 0.59, 0.672, 0.866]
    names = ["dense", *(f"unstructured@{v}" for v in levels), "1:2", "2:4", "1:4", "transposable2:4"]
    names += ["channel@0.1", "channel@0.469", "channel@0.522", "channel@0.5+2:4", "channel@0.5+4:8"]
    assert nearest_subnets(asked, names)[0] == first


@given(st.text(max_size=30), st.lists(st.sampled_from(["dense", "a@0.5", "b@0.1", "2:4", "a@0.2+1:2"]), unique=True))
@settings(deadline=None, derandomize=True, max_examples=100)
def test_anything_can_be_asked_for(asked: str, names: list[str]) -> None:
    assert set(nearest_subnets(asked, names)) <= set(names)


def test_a_benchmark_of_one_network_keeps_the_others() -> None:
    settings_ = ("--model", "users_model:build", "--repeats", "1", "--batch", "1")
    assert run("bench", "bundle", "2:4", "channel@0.469", *settings_, "--out", "p.json").exit_code == 0
    before = read_profile("p.json")
    assert run("bench", "bundle", "2:4", "unstructured@0.2", *settings_, "--out", "p.json").exit_code == 0
    after = read_profile("p.json")
    assert [n.name for n in after.networks] == ["dense", "2:4", "channel@0.469", "unstructured@0.2"]
    assert after.cost("channel@0.469").timings == before.cost("channel@0.469").timings  # type: ignore[union-attr]
    assert any(n.front for n in after.networks)
    said = refused("bench", "bundle", "2:4", *settings_[:-1], "4", "--out", "p.json")
    assert "batch sizes: 1, now 4" in said and "--out FILE" in said
    assert read_profile("p.json") == after
    Path("p.json").unlink()


def test_threads_are_left_as_they_were() -> None:
    before = torch.get_num_threads(), threading.active_count()
    refused("bench", *BUNDLE, "--threads", "2", "--device", "gpu")
    assert torch.get_num_threads() == before[0]
