"""The command line: what it prints, where, and with which exit code."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from torch import distributed as dist
from typer.testing import CliRunner, Result

from cocktailsdk import __version__
from cocktailsdk.cli.main import app, main

COMMANDS = ("train", "inspect", "subnets", "eval", "bench", "export", "report")


def run(*arguments: str, env: dict[str, str] | None = None) -> Result:
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "80", **(env or {})})


def in_a_process(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    program = "from cocktailsdk.cli.main import main; main()"
    # Whoever runs the tests may have asked for no colours, or for some; these tests say so themselves.
    inherited = {k: v for k, v in os.environ.items() if k not in {"NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE"}}
    return subprocess.run(
        [sys.executable, "-c", program, *arguments],
        capture_output=True,
        text=True,
        encoding="utf-8",
        env={**inherited, **env},
        check=False,
    )


def test_import_and_help_load_no_heavy_library() -> None:
    program = (
        "import sys, cocktailsdk\n"
        "from cocktailsdk.cli.main import main\n"
        "sys.argv = ['cocktail-cli', '--help']\n"
        "try:\n"
        "    main()\n"
        "except SystemExit as stop:\n"
        "    assert not stop.code, stop.code\n"
        "heavy = {'torch', 'timm', 'transformers', 'torchvision', 'numpy', 'matplotlib', 'sklearn'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command: str) -> None:
    done = run(command, "--help")
    assert done.exit_code == 0
    assert f"cocktail-cli {command} " in re.sub(r"\x1b\[[0-9;]*m", "", done.output)


def test_version() -> None:
    assert run("--version").output.strip() == f"cocktailsdk {__version__}"


@pytest.mark.parametrize(
    "arguments",
    [
        ("no-such-command",),
        ("inspect",),
        ("inspect", "resnet18", "--input-size", "large"),
        ("inspect", "resnet18", "--input-size", "3,0,2"),
        ("train",),
        ("train", "--preset", "digits", "--seed", "seven"),
        ("train", "--preset", "cifar10", "--start", "pretrained"),
        ("train", "--preset", "cifar10", "--start", "sideways"),
        ("subnets",),
    ],
)
def test_usage_errors_exit_with_2(arguments: tuple[str, ...]) -> None:
    assert run(*arguments).exit_code == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("inspect", "resnet5o"), "resnet50"),
        (("inspect", "nowhere.to.be:found"), "no module"),
        (("train", "--preset", "digit"), "digits"),
        (("train", "--preset", "cifar10", "--data", "not/here"), "not/here"),
        (("train", "--preset", "cifar10"), "--data"),
        (("train", "--preset", "digits", "--model", "resnet18"), "model"),
        (("subnets", "not/here"), "not/here"),
        (("eval", "not/here"), "not/here"),
    ],
)
def test_failures_say_one_thing_on_stderr_and_exit_with_1(
    arguments: tuple[str, ...], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = run(*arguments)
    assert done.exit_code == 1
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert said in done.stderr
    assert "Traceback" not in done.stderr


NET = """
from torch import nn

def build():
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.ReLU(),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4))

class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)
    def forward(self, x):
        return self.inner(x) if x.sum().item() > 0 else x

def odd():
    return Odd()
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "of_the_user.py").write_text(NET)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "of_the_user", raising=False)
    return tmp_path


@pytest.mark.usefixtures("here")
def test_inspect_a_factory_in_the_current_folder() -> None:
    done = run("inspect", "of_the_user:build", "--input-size", "3,12,12")
    assert done.exit_code == 0, done.output
    assert "1x3x12x12" in done.stdout
    for said in ("Layers", "Channel groups", "Kept whole", "first convolution", "classifier", "Sum:"):
        assert said in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert "\x1b" not in done.stdout


@pytest.mark.usefixtures("here")
def test_inspect_tries_inputs_where_none_are_known() -> None:
    done = run("inspect", "of_the_user:build", "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["inputs"] == ["1x3x224x224 float32"]
    assert [layer["module"] for layer in found["layers"]] == ["0", "3", "7"]
    assert found["followed"] is True


@pytest.mark.usefixtures("here")
def test_inspect_does_not_fail_on_what_cannot_be_followed() -> None:
    done = run("inspect", "of_the_user:odd", "--input-size", "4")
    assert done.exit_code == 0, done.output
    assert "could not be exported" in done.stdout
    assert run("inspect", "of_the_user:odd", "--input-size", "4", "--input-size", "5").exit_code == 0


def test_inspect_resnet50() -> None:
    done = in_a_process("inspect", "resnet50", COLUMNS="80")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert "\x1b" not in done.stdout
    for said in (
        "25.56 M parameters",
        "8.18 GFLOPs",
        "64x3x7x7",
        "layer4.2.conv3",
        "channel@0.5",
        "an output of the model",
    ):
        assert said in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("reference", ["hf:bert", "hf:vit"])
def test_inspect_transformers_as_data(reference: str) -> None:
    done = run("inspect", reference, "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["reference"] == reference
    assert len(found["layers"]) > 70
    assert any("attention" in g["name"] and g["channels"] == 64 for g in found["groups"])
    assert {s["pattern"] for s in found["savings"]} == {"unstructured", "n:m", "channel"}


def test_colour_only_where_it_is_wanted() -> None:
    for env in ({}, {"NO_COLOR": "1"}):
        assert "\x1b[" not in in_a_process("subnets", "not/here", **env).stderr
    coloured = in_a_process("subnets", "not/here", FORCE_COLOR="1", TERM="xterm-256color")
    assert "\x1b[1;31m" in coloured.stderr
    assert "31m" not in in_a_process("subnets", "not/here", FORCE_COLOR="1", NO_COLOR="1", TERM="xterm").stderr


def test_processes_of_a_launched_run_are_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["cocktail-cli", "--version"])
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        with pytest.raises(SystemExit) as end:
            main()
        assert not end.value.code
        assert not dist.is_initialized()
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        monkeypatch.setattr(sys, "argv", ["cocktail-cli", "subnets", str(tmp_path / "nothing")])
        with pytest.raises(SystemExit) as end:
            main()
        assert end.value.code == 1
        assert dist.is_initialized()  # nobody waits for others after an error
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
