"""What README and the documentation show runs as it stands there, and their numbers are those of the results."""

from __future__ import annotations

import ast
import importlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny import IMAGE, TinyNet

from cocktailsdk.exporting.formats import FORMATS
from cocktailsdk.graph.rules import RULES
from cocktailsdk.patterns import registry
from cocktailsdk.patterns.scores import registry as score_registry
from cocktailsdk.presets import PRESETS

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pytest.fixture
def own_registries() -> Iterator[None]:
    """What a page registers is gone after it."""
    known = (RULES, registry._REGISTERED, score_registry._REGISTERED, FORMATS, PRESETS)
    before = [dict(kinds) for kinds in known]
    yield
    for kinds, had in zip(known, before, strict=True):
        kinds.clear()
        kinds.update(had)


@pytest.mark.slow
@pytest.mark.usefixtures("own_registries")
@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=lambda p: p.stem)
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(32, 3, IMAGE, IMAGE, generator=generator)
    loader = list(zip(images.split(8), (torch.arange(32) % 5).split(8), strict=True))
    yours = {"model": TinyNet(), "x": images[:1], "train_loader": loader, "val_loader": loader[:2], "torch": torch}
    for block in blocks(page, "python"):
        exec(compile(block, str(page), "exec"), yours)  # noqa: S102, RUF100


def test_blocks_that_need_a_hub_a_server_or_a_cluster_name_what_there_is() -> None:
    import cocktailsdk as cocktail

    found = [(page, block) for page in PAGES for block in blocks(page, "py")]
    assert found
    for page, block in found:
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("cocktail"):
                module = importlib.import_module(node.module or "")
                assert all(hasattr(module, name.name) for name in node.names), f"{page.name}: {ast.unparse(node)}"
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "cocktail":
                assert hasattr(cocktail, node.attr), f"{page.name}: cocktail.{node.attr}"


@pytest.mark.slow
def test_the_example_runs(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "quickstart.py"), str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "slim differs from masked by" in done.stdout


def test_the_readme_has_the_two_commands_that_ci_runs() -> None:
    def command(which: int) -> str:
        script = str(ROOT / ".ci" / "readme_command.py")
        return subprocess.run([sys.executable, script, str(which)], capture_output=True, text=True, check=True).stdout

    assert command(1).splitlines() == [
        "python3 -m venv .venv && . .venv/bin/activate",
        'pip install -c constraints.txt -e ".[dev]" && cocktail-cli train --preset digits --out runs/digits',
    ]
    assert command(2).strip() == ". .venv/bin/activate && pytest -n 2 --dist loadfile"
    assert len(blocks(ROOT / "README.md", "bash")) == 2


def test_commands_that_are_shown_exist() -> None:
    from typer.testing import CliRunner

    from cocktailsdk.cli.main import app

    shown = {c for p in PAGES for block in blocks(p, "bash") for c in re.findall(r"^cocktail-cli (\w+)", block, re.M)}
    assert shown == {"train", "inspect", "subnets", "eval", "bench", "export", "report"}
    for name in shown:
        assert CliRunner().invoke(app, [name, "--help"]).exit_code == 0


def test_the_options_of_every_command_are_documented_and_no_others() -> None:
    import typer

    from cocktailsdk.cli.main import app

    group = typer.main.get_command(app)
    sections = (ROOT / "docs" / "command-line.md").read_text(encoding="utf-8").split("\n## ")[1:]
    assert sorted(group.commands) == sorted(section.partition("\n")[0] for section in sections)
    for section in sections:
        name = section.partition("\n")[0]
        rows = "".join(re.findall(r"^\| (`--[^|]*)", section, re.MULTILINE))
        flags = {flag for p in group.commands[name].params for flag in (*p.opts, *p.secondary_opts)}
        options = {flag for flag in flags if flag.startswith("--")} - {"--json", "--help"}
        assert set(re.findall(r"--[a-z0-9-]+", rows)) == options, name


def test_measured_tables_are_what_the_results_say() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "docs" / "make_tables.py"), "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_pictures_of_coupling_are_what_the_library_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    from coupling_pictures import ASSETS, drawn, pictures

    for picture in pictures():
        found = (ASSETS / f"coupling-{picture.name}.svg").read_text(encoding="utf-8")
        assert drawn(picture) == found, f"{picture.name}: run python docs/coupling_pictures.py"


def test_a_pattern_of_your_own_takes_30_lines() -> None:
    (pattern,) = (b for b in blocks(ROOT / "docs" / "patterns.md", "python") if "register_pattern" in b)
    assert len(pattern.splitlines()) <= 30


def test_files_that_contributors_are_sent_to_exist() -> None:
    text = (ROOT / "docs" / "contributing.md").read_text(encoding="utf-8")
    named = re.findall(r"`((?:cocktailsdk|tests|docs|benchmarks|adapters|\.ci)/[\w./]*)`", text)
    rows = re.findall(r"^\| (`[^|]*) \| [^|]* \| ([^|]*)\|$", text, re.MULTILINE)
    for places, tests in rows:
        named += [
            f"cocktailsdk/{name}" for name in re.findall(r"`([^`]+)`", places) if not name.startswith("adapters/")
        ]
        named += [f"tests/{name}" for name in re.findall(r"`([^`]+)`", tests)]
    assert len(rows) > 15
    for name in named:
        assert list(ROOT.glob(name)), f"docs/contributing.md names {name}"


def test_links_between_pages_lead_somewhere() -> None:
    for page in (*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md"):
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for page in (ROOT / "docs").glob("*.md"):
        assert f": {page.name}" in navigation, f"{page.name} is not in mkdocs.yml"


def test_thresholds_of_ci_reject_what_is_not_good_enough(tmp_path: Path) -> None:
    def verdict(channel: float) -> int:
        networks = [{"pattern": p, "metric": m} for p, n, m in (
            ("dense", 1, 0.98), ("unstructured", 10, 0.97), ("n:m", 3, 0.97), ("channel", 10, channel)
        ) for _ in range(n)]  # fmt: skip
        import json

        (tmp_path / "report.json").write_text(
            json.dumps({"networks": networks, "bundle_bytes": 140, "dense_bytes": 100, "seconds": 60})
        )
        script = [sys.executable, str(ROOT / ".ci" / "thresholds.py"), str(tmp_path / "report.json")]
        return subprocess.run(script, capture_output=True, check=False, env=os.environ).returncode

    assert verdict(0.93) == 0
    assert verdict(0.91) == 1
