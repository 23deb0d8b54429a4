"""Nothing imports upward, and no file is part of an import circle. The contract is in ``pyproject.toml``."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

grimp = pytest.importorskip("grimp", reason="needs grimp: pip install grimp")
pytest.importorskip("importlinter", reason="needs import-linter: pip install import-linter")
networkx = pytest.importorskip("networkx", reason="needs networkx, which torch installs")

ROOT = Path(__file__).resolve().parent.parent


def lint_imports(root: Path) -> tuple[int, str]:
    """The exit code and output of ``lint-imports`` on a checkout."""
    program = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(root), str(root / "adapters")]), "NO_COLOR": "1"}
    done = subprocess.run(
        [sys.executable, "-P", "-c", program, "--no-logo", "--no-cache"],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the packages and their contract."""
    for package in ("cocktailsdk", "adapters"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_no_file_is_part_of_an_import_circle_not_even_by_imports_in_functions_or_for_type_checkers() -> None:
    graph = grimp.build_graph("cocktailsdk", cache_dir=None, exclude_type_checking_imports=False)
    imports = networkx.DiGraph(
        (m, other) for m in graph.modules for other in graph.find_modules_directly_imported_by(m)
    )
    circles = [sorted(circle) for circle in networkx.strongly_connected_components(imports) if len(circle) > 1]
    assert circles == []


def test_the_contract_is_kept() -> None:
    code, output = lint_imports(ROOT)
    assert code == 0, output
    assert "0 broken" in output


@pytest.mark.parametrize(
    ("package", "line", "upward"),
    [
        ("masks", "from ..net.switcher import Switcher", "cocktailsdk.net.switcher"),
        ("graph", "def f(): from ..patterns import NM", "cocktailsdk.patterns"),
        ("utils", "import typing\nif typing.TYPE_CHECKING: from ..api import CocktailNet", "cocktailsdk.api"),
        ("slimming", "from ..verify import verify_nm", "cocktailsdk.verify"),
    ],
    ids=["at the top", "in a function", "for type checkers", "beside"],
)
def test_an_upward_import_is_refused_wherever_it_stands(copy: Path, package: str, line: str, upward: str) -> None:
    path = copy / "cocktailsdk" / package / "__init__.py"
    path.write_text(f"{path.read_text(encoding='utf-8')}\n\n{line}\n", encoding="utf-8")
    code, output = lint_imports(copy)
    assert code == 1
    assert "Nothing imports upward BROKEN" in output
    assert f"- cocktailsdk.{package} -> {upward} (l." in output


def test_a_new_module_must_get_its_layer(copy: Path) -> None:
    (copy / "cocktailsdk" / "helpers.py").write_text('"""Something."""\n', encoding="utf-8")
    code, output = lint_imports(copy)
    assert code == 1
    assert "helpers" in output
