"""The terminal's manners: any width, large models in few lines, completion, data on demand."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from pathlib import Path

import pytest
import typer
from report_runs import REPORT, TRAINED
from rich.console import Console, RenderableType
from typer.testing import CliRunner, Result

from cocktailsdk import presets as presets_package
from cocktailsdk.cli.main import app
from cocktailsdk.cli.options import PRESETS, networks, presets
from cocktailsdk.inspection import ChannelGroup, Eligibility, Inspection, Layer
from cocktailsdk.report.inspection import MOST_LAYERS, REPEATED, inspection_view
from cocktailsdk.report.tables import run_view

WIDTHS = (60, 80, 200)
COMMANDS = ("train", "inspect", "subnets", "eval", "bench", "export", "report")


def run(*arguments: str, columns: int = 80) -> Result:
    environment = {"COLUMNS": str(columns), "TERMINAL_WIDTH": str(columns)}
    return CliRunner().invoke(app, list(arguments), env=environment)


def printed(what: RenderableType, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width, markup=False, emoji=False)
    console.print(what)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_any_width_has_an_example_and_offers_data(command: str) -> None:
    for columns in WIDTHS:
        done = run(command, "--help", columns=columns)
        assert done.exit_code == 0
        assert max(map(len, done.stdout.splitlines())) <= columns
        words = " ".join(re.sub(r"\x1b\[[0-9;]*m|[│╭╮╰╯─]", " ", done.stdout).split())
        assert f"Example: cocktail-cli {command} " in words
        assert "--json" in words


def test_every_command_is_listed_and_completion_can_be_installed() -> None:
    said = run("--help").stdout
    assert all(re.search(rf"\b{command}\b", said) for command in COMMANDS)
    assert any("--install-completion" in p.opts for p in typer.main.get_command(app).params)


def test_mistyped_commands_and_options_are_answered_with_the_nearest() -> None:
    for arguments, meant in ((("repot",), "report"), (("inspect", "resnet50", "--grops"), "--groups")):
        done = run(*arguments)
        assert done.exit_code == 2
        assert meant in done.stderr


@pytest.mark.parametrize("width", WIDTHS)
def test_the_table_of_a_run_fits(width: int) -> None:
    for report in (REPORT, TRAINED):
        assert max(map(len, printed(run_view(report), width).splitlines())) <= width


def test_the_table_of_a_run_from_trained_weights_has_its_passes() -> None:
    text = printed(run_view(TRAINED))
    assert re.search(r"^channel@0\.5 .* 2,100$", text, re.MULTILINE)
    assert "dense, held-out accuracy: 0.9750 before training, 0.9800 after" in text


def layers(blocks: int) -> Inspection:
    """A transformer's layers, their graph known."""
    yes = Eligibility(True)
    no = Eligibility(False, "it is the classifier")

    def layer(module: str, group: str, may: Eligibility = yes) -> Layer:
        coverage = {2: 1.0, 4: 1.0, 8: 0.5}
        return Layer(f"{module}.weight", module, "linear", (64, 64), 4096, 8192, "", may, may, coverage, may, (group,))

    found = [
        layer(f"blocks.{i}.{part}", f"blocks.{i}.{part}") for i in range(blocks) for part in ("attn.qkv", "mlp.fc1")
    ]
    groups = tuple(
        ChannelGroup(f"blocks.{i}.{part}", 12, 5, (f"blocks.{i}.{part}.weight",), (), (f"blocks.{i}.{part}2.weight",))
        for i in range(blocks)
        for part in ("attn.qkv", "mlp.fc1")
    )
    head = replace(layer("head", "", no), groups=())
    return Inspection("Net", ("1x64",), True, (*found, head), groups, (), 10**6, 10**9, (), proven=True)


@pytest.mark.parametrize("width", WIDTHS)
def test_repeated_blocks_of_large_models_are_shown_once(width: int) -> None:
    text = printed(inspection_view(layers(200), "net"), width)
    assert len(text.splitlines()) < 30
    assert max(map(len, text.splitlines())) <= width
    assert REPEATED in " ".join(text.split())
    for said in ("blocks.0-199", "attn.qkv", "mlp.fc1", "head"):
        assert said in text
    assert "blocks.7" not in text


def test_all_layers_are_shown_when_they_are_asked_for_or_few() -> None:
    full = printed(inspection_view(layers(200), "net", full=True))
    assert "blocks.7.attn.qkv" in full
    assert "blocks.199.mlp.fc1" in full
    assert REPEATED not in " ".join(full.split())
    few = printed(inspection_view(layers(MOST_LAYERS // 2 - 1), "net"))
    assert few == printed(inspection_view(layers(MOST_LAYERS // 2 - 1), "net", full=True))


def test_what_differs_among_repeated_blocks_is_shown_apart() -> None:
    found = layers(40)
    wider = [replace(x, shape=(128, 64), params=8192) if x.module == "blocks.3.mlp.fc1" else x for x in found.layers]
    text = printed(inspection_view(replace(found, layers=tuple(wider)), "net"), 120)
    assert "blocks.0-2,4-39.mlp.fc1" in " ".join(text.split()) or "blocks.0-2,4-39" in text
    assert "blocks.3" in text
    assert "128x64" in text


def test_presets_and_networks_are_completed(tmp_path: Path) -> None:
    from tiny import tiny_net

    assert set(PRESETS) == set(presets_package.PRESETS)
    assert presets("c") == ["cifar10"]
    tiny_net(["2:4", "channel@0.5"]).save_pretrained(tmp_path / "bundle")
    context = typer.Context(typer.main.get_command(app))
    assert networks(context, "") == []
    for given in (tmp_path, tmp_path / "bundle"):
        context.params["bundle"] = str(given)
        assert networks(context, "") == ["dense", "2:4", "channel@0.5"]
        assert networks(context, "ch") == ["channel@0.5"]
    context.params["bundle"] = str(tmp_path / "half-ty")
    assert networks(context, "") == []
