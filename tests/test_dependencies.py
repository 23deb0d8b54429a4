"""The package imports what it declares; what only an extra installs is imported through one helper, late."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from cocktailsdk.errors import CocktailError, TrainingError
from cocktailsdk.utils.optional import EXTRAS, check_installed, install_command, require

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
FILES = sorted([*(ROOT / "cocktailsdk").rglob("*.py"), *(ROOT / "adapters").rglob("*.py")])
OWN = {"cocktailsdk", "cocktail_adapters"}
COMES_WITH = {"click": "typer"}
"""Modules that the package imports without declaring their distribution, and what brings it."""
DISTRIBUTIONS = {"PIL": "pillow", "sklearn": "scikit-learn", "yaml": "pyyaml"}
"""Distributions that have another name than their module."""


def names(requirements: list[str]) -> set[str]:
    """Distributions that are asked for, also through other extras of this package."""
    found: set[str] = set()
    for requirement in map(Requirement, requirements):
        if requirement.name == PROJECT["name"]:
            for extra in requirement.extras:
                found |= names(PROJECT["optional-dependencies"][extra])
        else:
            found.add(canonicalize_name(requirement.name))
    return found


def distribution(module: str) -> str:
    return canonicalize_name(DISTRIBUTIONS.get(module, module))


def for_types_alone(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def walk(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes, without those that only a type checker reads."""
    yield node
    for child in ast.iter_child_nodes(node):
        if not for_types_alone(child):
            yield from walk(child)


def imported(node: ast.AST) -> Iterator[str]:
    """The top-level modules that a statement imports by an absolute name."""
    if isinstance(node, ast.Import):
        yield from (alias.name.partition(".")[0] for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and not node.level:
        yield str(node.module).partition(".")[0]


def required(node: ast.AST) -> Iterator[str]:
    """The top-level modules that a call of the helper imports."""
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "require":
        yield ast.literal_eval(node.args[0]).partition(".")[0]


def test_import_statements_name_only_what_a_base_install_has() -> None:
    base = names(PROJECT["dependencies"])
    undeclared, needless = [], []
    for file in FILES:
        nodes = list(walk(ast.parse(file.read_text(encoding="utf-8"))))
        modules = {m for node in nodes for m in imported(node)} - sys.stdlib_module_names - OWN
        undeclared += [f"{file}: {m}" for m in modules if distribution(COMES_WITH.get(m, m)) not in base]
        needless += [f"{file}: {m}" for node in nodes for m in required(node) if distribution(m) in base]
    assert not undeclared, "declare these in pyproject.toml, or import them by cocktailsdk.utils.optional.require"
    assert not needless, "these are always installed; use an import statement"


def test_each_optional_module_is_in_the_extra_that_is_named() -> None:
    for module, extra in EXTRAS.items():
        assert distribution(module) in names(PROJECT["optional-dependencies"][extra]), module


def test_the_readmes_install_has_every_extra_of_the_library_and_the_examples() -> None:
    extras = PROJECT["optional-dependencies"]
    for extra in set(extras) - {"dev", "notebooks"}:
        assert names(extras[extra]) <= names(extras["dev"]), extra
    assert {"scipy", "accelerate", "matplotlib", "scikit-learn", "torchvision"} <= names(extras["dev"])


def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *more: None if n in ("matplotlib", "onnx") else find(n))
    with pytest.raises(CocktailError) as caught:
        require("matplotlib.figure", "drawing figures")
    assert str(caught.value) == (
        'drawing figures needs matplotlib, which is not installed: pip install "cocktailsdk[plots]"'
    )
    with pytest.raises(TrainingError, match=r'matplotlib, onnx, which are not .*"cocktailsdk\[onnx,plots\]"'):
        check_installed("matplotlib", "onnx", "torch", purpose="this", error=TrainingError)
    with pytest.raises(CocktailError, match=r'needs onnx, which is not installed: pip install "cocktailsdk\[mine\]"'):
        check_installed("onnx", purpose="this", extra="mine")
    assert install_command("nncf") == "pip install nncf"


def test_packages_that_are_installed_are_imported() -> None:
    assert require("importlib.metadata", "this").version("torch")
    check_installed("torch", "numpy", purpose="this")


def test_a_base_install_trains_saves_loads_and_names_what_else_needs(tmp_path: Path) -> None:
    program = Path(__file__).with_name("base_install_program.py")
    done = subprocess.run([sys.executable, program, tmp_path / "run"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("all done\n")
    assert "channel@0.5" in done.stdout
