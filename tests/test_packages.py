"""What is built to be installed has the packages, whole, and nothing else."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def packages() -> ModuleType:
    spec = importlib.util.spec_from_file_location("packages", ROOT / ".ci" / "packages.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def built(packages: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    pytest.importorskip("hatchling", reason="hatchling, which builds the package, is not installed")
    return packages.build(sys.executable, tmp_path_factory.mktemp("dist"))


def test_wheel_and_sdist_have_what_they_should(packages: ModuleType, built: tuple[Path, Path]) -> None:
    wheel, sdist = built
    assert packages.wheel_faults(wheel) == []
    assert packages.sdist_faults(sdist) == []


def test_what_is_lacking_and_what_is_too_much_is_told(
    packages: ModuleType, built: tuple[Path, Path], tmp_path: Path
) -> None:
    changed = tmp_path / built[0].name
    with zipfile.ZipFile(built[0]) as old, zipfile.ZipFile(changed, "w") as new:
        for name in old.namelist():
            if name != "cocktailsdk/py.typed":
                new.writestr(name, old.read(name))
        new.writestr("tests/conftest.py", "")
    assert packages.wheel_faults(changed) == [
        "the wheel lacks cocktailsdk/py.typed",
        "the wheel has tests/conftest.py",
    ]


def test_the_wheel_runs_where_the_repository_is_not(built: tuple[Path, Path], tmp_path: Path) -> None:
    with zipfile.ZipFile(built[0]) as archive:
        archive.extractall(tmp_path)
    program = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from cocktailsdk.cli.main import main; main()"
    done = subprocess.run(
        [sys.executable, "-I", "-c", program, "--version"], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert done.stdout.startswith("cocktailsdk ")
