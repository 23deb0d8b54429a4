"""The notebooks run from top to bottom, and what they show is what they print."""

from __future__ import annotations

import json
import re
import tempfile
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest
import torch

NOTEBOOKS = sorted((Path(__file__).resolve().parent.parent / "examples" / "notebooks").glob("*.ipynb"))
NEEDS = {"deployment": ("onnx", "onnxscript", "onnxruntime")}


def code_cells(path: Path) -> list[dict[str, Any]]:
    return [c for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"]


def text(lines: list[str] | str) -> str:
    """What is printed, without numbers: accuracies are not the same on every machine."""
    return re.sub(r"[\d.,]*\d", "#", re.sub(r"\s+", " ", "".join(lines))).strip()


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_runs_and_prints_what_it_shows(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in NEEDS.get(path.stem, ()):
        pytest.importorskip(package, reason=f"{package} is not installed")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    own: dict[str, Any] = {"__name__": "__main__"}
    with torch.random.fork_rng(devices=[]):
        for cell in code_cells(path):
            with redirect_stdout(StringIO()) as printed:
                exec(compile("".join(cell["source"]), f"{path.name}, cell {cell['id']}", "exec"), own)  # noqa: S102, RUF100
            if "varies" in cell["metadata"].get("tags", ()):
                assert cell["outputs"] == []
                continue
            shown = [o["text"] for o in cell["outputs"] if o["output_type"] == "stream"]
            assert text(printed.getvalue()) == text([line for part in shown for line in part]), cell["id"]
            drawn = [o for o in cell["outputs"] if o["output_type"] == "display_data" and "image/png" in o["data"]]
            assert len(drawn) == len(plt.get_fignums())
            plt.close("all")


def test_there_are_three() -> None:
    assert [p.stem for p in NOTEBOOKS] == ["deployment", "quickstart", "your_model"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_is_kept_as_it_was_run_from_the_top(path: Path) -> None:
    cells = code_cells(path)
    assert [c["execution_count"] for c in cells] == [*range(1, len(cells) + 1)]
    outputs = [o for c in cells for o in c["outputs"]]
    assert {o["output_type"] for o in outputs} <= {"stream", "display_data"}, "an error, or a value shown by itself"
    assert all(o["name"] == "stdout" for o in outputs if o["output_type"] == "stream")
    assert len(path.read_bytes()) < 100_000
    for target in re.findall(r"\]\(([^)#:]+)\)", path.read_text(encoding="utf-8")):
        assert (path.parent / target).exists(), target
