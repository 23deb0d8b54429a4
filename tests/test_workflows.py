"""GitHub runs the same scripts as everybody, with few rights and actions that cannot change."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from test_pins import ROOT, script

FOLDER = ROOT / ".github" / "workflows"
FILES = sorted(FOLDER.glob("*.yml"))


def read(path: Path) -> dict[Any, Any]:
    yaml = pytest.importorskip("yaml")
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def jobs(path: Path) -> list[dict[str, Any]]:
    return list(read(path)["jobs"].values())


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_a_workflow_reads_only_and_ends(path: Path) -> None:
    assert read(path)["permissions"] == {"contents": "read"}
    for job in jobs(path):
        assert "permissions" not in job
        assert job["timeout-minutes"] <= 75


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_its_actions_are_named_by_commit(path: Path) -> None:
    uses = re.findall(r"uses: (.*)", path.read_text(encoding="utf-8"))
    assert uses
    assert all(re.fullmatch(r"actions/[a-z-]+@[0-9a-f]{40} # v[\d.]+", use) for use in uses)


def test_workflows_run_the_scripts_of_this_repository() -> None:
    commands = [step["run"] for path in FILES for job in jobs(path) for step in job["steps"] if "run" in step]
    scripts = {name for command in commands for name in re.findall(r"\.ci/[\w.]+", command)}
    assert scripts == {".ci/run", ".ci/matrix.py", ".ci/newest"}
    assert all((ROOT / name).exists() for name in scripts)


def test_the_matrix_of_github_is_that_of_the_script() -> None:
    (job,) = jobs(FOLDER / "matrix.yml")
    cells = [f"python{row['python']}={row['torch']}" for row in job["strategy"]["matrix"]["include"]]
    assert cells == [cell.name for cell in script("matrix").CELLS]
