"""The cells of .ci/matrix.py install what they say, and nothing that breaks torchvision."""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import pytest
from test_pins import CONSTRAINTS, PINS, ROOT, script


@pytest.fixture(scope="module")
def matrix() -> ModuleType:
    return script("matrix")


def test_two_of_five_cells_run_every_test(matrix: ModuleType) -> None:
    assert [(c.name, c.full) for c in matrix.CELLS] == [
        ("python3.11=2.11", True),
        ("python3.11=pinned", True),
        ("python3.12=2.13", False),
        ("python3.13=2.14", False),
        ("python3.12=newest", False),
    ]
    for name in matrix.TESTS:
        assert (ROOT / "tests" / f"test_{name}.py").exists()


def test_a_release_of_torch_takes_the_torchvision_that_goes_with_it(matrix: ModuleType) -> None:
    found = {c.name: dict(_torch(matrix.constraints_of(c, CONSTRAINTS))) for c in matrix.CELLS}
    assert found == {
        "python3.11=2.11": {"torch": "===2.11.0", "torchvision": "===0.26.0"},
        "python3.11=pinned": {"torch": "==2.14.1", "torchvision": "==0.29.1"},
        "python3.12=2.13": {"torch": "===2.13.0", "torchvision": "===0.28.0"},
        "python3.13=2.14": {"torch": "===2.14.1", "torchvision": "===0.29.1"},
        "python3.12=newest": {},
    }


def _torch(constraints: str) -> list[tuple[str, str]]:
    lines = PINS.pins(constraints)
    return [(line.name, str(line.specifier)) for line in lines if line.name in ("torch", "torchvision")]


def test_an_exact_release_is_not_met_by_a_build_for_processors_only(matrix: ModuleType) -> None:
    (cell,) = (c for c in matrix.CELLS if c.wanted == "2.13")
    (torch,) = (line for line in PINS.pins(matrix.constraints_of(cell, CONSTRAINTS)) if line.name == "torch")
    assert torch.specifier.contains("2.13.0")
    assert not torch.specifier.contains("2.13.0+cpu")
    with pytest.raises(matrix.CellError, match=r"torch 2\.13\.0\+cpu was installed, which is not PyPI's 2\.13\.0"):
        matrix.refuse_local("2.13.0+cpu", "0.28.0")
    matrix.refuse_local("2.13.0", "0.28.0")


def test_a_torchvision_that_fails_to_import_is_told(matrix: ModuleType, tmp_path: Path) -> None:
    fake = tmp_path / "bin" / "python"
    fake.parent.mkdir()
    fake.write_text(
        "#!/bin/sh\ncase \"$2\" in *nms*) echo 'operator torchvision::nms does not exist' >&2; exit 1;; esac\n"
        "echo 2.13.0 0.28.0\n"
    )
    fake.chmod(0o755)
    with pytest.raises(matrix.CellError, match="do not go together .*nms does not exist"):
        matrix.look(fake)


def test_this_environment_passes_the_same_look(matrix: ModuleType) -> None:
    if "+" in version("torch") or "+" in version("torchvision"):
        pytest.skip("torch is a build of PyTorch's own index")
    assert set(matrix.look(Path(sys.executable))) == {"python", *matrix.SHOWN}


def test_a_row_replaces_that_of_the_same_cell(
    matrix: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matrix, "RESULTS", tmp_path / "versions.json")
    rows = [("3.12.1", "newest", 1), ("3.11.7", "pinned", 2), ("3.11.7", "2.11", 3), ("3.11.9", "pinned", 4)]
    for python, wanted, passed in rows:
        matrix.keep_row({"python": python, "cell": wanted, "passed": passed})
    kept = json.loads((tmp_path / "versions.json").read_text())["rows"]
    assert [(r["cell"], r["passed"]) for r in kept] == [("2.11", 3), ("pinned", 4), ("newest", 1)]


def test_an_interpreter_that_is_missing_is_named(matrix: ModuleType) -> None:
    with pytest.raises(matrix.CellError, match=r"python3\.99 was not found"):
        matrix.interpreter("python3.99")
