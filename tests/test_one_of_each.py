"""Helpers are defined once, and imported from where they are defined."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "cocktailsdk"
ONCE = {
    "default_forward": "utils/nested.py",
    "device_of": "utils/devices.py",
    "evaluating": "utils/modes.py",
    "fsync": "io/atomic.py",
    "modes_restored": "utils/modes.py",
    "new_folder": "io/folders.py",
    "read_tensors": "io/tensors.py",
    "to_device": "utils/nested.py",
    "write_atomic": "io/atomic.py",
    "write_tensors": "io/tensors.py",
}
"""Helpers that were written twice before, or easily could be, and where they are now."""
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py")


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def named(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def imports(path: Path) -> Iterator[tuple[Path, str]]:
    """Names that a module imports from other modules of the package, with those modules' files."""
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.ImportFrom) and node.level:
            folder = path.parents[node.level - 1]
            source = folder.joinpath(*(node.module or "").split(".")).with_suffix(".py")
            if source.is_file():
                yield from ((source, alias.name) for alias in node.names)


def top_level(body: list[ast.stmt]) -> Iterator[str]:
    """Names that a module defines, also inside ``if`` and ``try``."""
    for node in body:
        match node:
            case ast.FunctionDef() | ast.ClassDef():
                yield node.name
            case ast.Assign() | ast.AnnAssign():
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                yield from (n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name))
            case ast.If() | ast.Try():
                yield from top_level(
                    [*node.body, *node.orelse, *(s for h in getattr(node, "handlers", ()) for s in h.body)]
                )


def test_helpers_that_were_written_twice_are_defined_once() -> None:
    found = [
        (node.name.lstrip("_"), named(path))
        for path in MODULES
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.FunctionDef) and node.name.lstrip("_") in ONCE
    ]
    assert sorted(found) == sorted(ONCE.items())


@pytest.mark.parametrize("word", ["os.replace(", "fcntl", "msvcrt", '.tmp"', "NamedTemporaryFile", "mkstemp"])
def test_only_io_writes_through_temporary_files_and_locks(word: str) -> None:
    users = [named(path) for path in MODULES if word in path.read_text(encoding="utf-8")]
    assert [user for user in users if not user.startswith("io/")] == []


def test_only_one_function_sets_back_the_modes_of_modules() -> None:
    def loops(tree: ast.Module) -> bool:
        """Whether a loop over pairs sets ``module.training`` to the other part of the pair."""
        return any(
            isinstance(node, ast.For)
            and isinstance(node.target, ast.Tuple)
            and any(
                isinstance(inner, ast.Assign)
                and isinstance(target := inner.targets[0], ast.Attribute)
                and target.attr == "training"
                and isinstance(inner.value, ast.Name)
                for inner in ast.walk(node)
            )
            for node in ast.walk(tree)
        )

    assert [named(path) for path in MODULES if loops(parsed(path))] == ["utils/modes.py"]


def test_every_name_is_imported_from_the_module_that_defines_it() -> None:
    wrong = [
        f"{named(path)} imports {name} from {named(source)}"
        for path in [*MODULES, *PACKAGE.rglob("__init__.py")]
        for source, name in imports(path)
        if name not in set(top_level(parsed(source).body))
    ]
    assert wrong == []


def test_no_module_lists_as_its_own_what_it_imports() -> None:
    wrong = []
    for path in MODULES:
        for node in parsed(path).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
                own = set(top_level(parsed(path).body))
                wrong += [f"{named(path)} lists {name}" for name in ast.literal_eval(node.value) if name not in own]
    assert wrong == []


def test_writing_files_and_folders_loads_no_torch() -> None:
    program = "import sys; from cocktailsdk.io import atomic, folders, values; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)
