"""Runs the tests with other versions of Python and PyTorch, each in an environment of its own.

    python .ci/matrix.py                            all five cells
    python .ci/matrix.py --keep FOLDER              environments stay in FOLDER; the next run with it reuses them
    python .ci/matrix.py --only python3.12=2.13     one cell
    python .ci/matrix.py --processes 2              of pytest, for each cell

A cell is an interpreter and what it installs: `pinned` is constraints.txt as it stands, a release of PyTorch is
constraints.txt with that release (and the torchvision that goes with it) in the place of its own, and `newest` is the
newest release of everything that installs. A full cell runs every test, the others the selection TESTS. An interpreter
is looked for on PATH and among pyenv's. Each environment takes 7 GB.

The tests are those of the last commit. Results go into benchmarks/results/versions.json, from which
docs/make_tables.py writes the table of docs/install.md. Exits with 1 if a test or an installation failed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "versions.json"
SHOWN = ("torch", "torchvision", "numpy", "transformers", "timm", "accelerate", "onnxruntime")
TORCHVISION = {"2.11": "0.26", "2.12": "0.27", "2.13": "0.28", "2.14": "0.29"}
"""The release of torchvision that is built for each release of torch."""
CAPPED = {"2.14": ("2.14.1", "0.29.1")}
"""Releases of which only these are offered everywhere."""
TESTS = [
    *("import", "public_api", "net_switch", "net_selection", "net_statistics", "net_threads", "net_views"),
    *("graph_rules", "graph_rules_attention", "graph_models", "graph_verify", "graph_grouped", "hf_slim"),
    *("inspect", "inspect_measured", "bundle", "bundle_format", "slim_api", "patterns_registry", "patterns_depth"),
    *("training_trainer", "training_ddp", "loops_frameworks", "export", "notebooks"),
]
"""What the cells that are not full run: every part of the library once, and whatever has differed between versions."""


@dataclass(frozen=True)
class Cell:
    """An interpreter, what is installed for it, and whether every test is run."""

    python: str
    wanted: str
    full: bool = False

    @property
    def name(self) -> str:
        """As it is typed after ``--only``."""
        return f"{self.python}={self.wanted}"


CELLS = (
    Cell("python3.11", "2.11", full=True),
    Cell("python3.11", "pinned", full=True),
    Cell("python3.12", "2.13"),
    Cell("python3.13", "2.14"),
    Cell("python3.12", "newest"),
)

PROBE = """
import importlib.metadata, json, platform, torch, torchvision
boxes = torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 1.0]])
assert torchvision.ops.nms(boxes, torch.tensor([1.0, 0.5]), 0.5).tolist() == [0]
print(json.dumps({"python": platform.python_version(), **{n: importlib.metadata.version(n) for n in %r}}))
"""


class CellError(Exception):
    """An environment that cannot be made, or is not what it should be."""


def main() -> int:
    """Run as a script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", metavar="CELL", help="one of " + ", ".join(c.name for c in CELLS))
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="where environments stay, and are found again")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="pytest's, for each cell (default: 1)")
    options = parser.parse_args()
    unknown = set(options.only or ()) - {c.name for c in CELLS}
    if unknown:
        parser.error(f"there is no cell {', '.join(sorted(unknown))}; choose from {', '.join(c.name for c in CELLS)}")
    failed = 0
    for cell in CELLS:
        if options.only and cell.name not in options.only:
            continue
        with tempfile.TemporaryDirectory() as work:
            try:
                row = run_cell(cell, (options.keep or Path(work)) / folder_of(cell), options.processes)
            except (CellError, subprocess.CalledProcessError) as error:
                print(f"FAIL  {cell.name}: {error}", flush=True)
                failed += 1
                continue
        keep_row(row)
        print(json.dumps(row), flush=True)
        failed += row["failed"]
    return int(failed > 0)


def run_cell(cell: Cell, folder: Path, processes: int) -> dict[str, Any]:
    """Install, look, test: one row of the table."""
    inside, versions = prepare(cell, folder)
    began = time.monotonic()
    counts = run_tests(inside, folder, tests_of(cell), processes)
    tests = "all" if cell.full else "selection"
    return {
        **versions,
        "cell": cell.wanted,
        "tests": tests,
        **counts,
        "minutes": round((time.monotonic() - began) / 60),
    }


def tests_of(cell: Cell) -> list[str]:
    """The files that a cell runs; none stands for all."""
    return [] if cell.full else [f"tests/test_{name}.py" for name in TESTS]


def prepare(cell: Cell, folder: Path, *, upgrade: bool = False) -> tuple[Path, dict[str, str]]:
    """An environment with the tree of the last commit, and its versions."""
    tree, environment = folder.resolve() / "tree", folder.resolve() / "venv"
    shutil.rmtree(tree, ignore_errors=True)
    tree.mkdir(parents=True)
    archive = subprocess.run(["git", "archive", "HEAD"], check=True, cwd=ROOT, capture_output=True).stdout
    subprocess.run(["tar", "x", "-C", str(tree)], check=True, input=archive)
    inside = environment / ("Scripts" if os.name == "nt" else "bin") / "python"
    if not inside.exists():
        subprocess.run([interpreter(cell.python), "-m", "venv", str(environment)], check=True)
    constraints = folder.resolve() / "constraints.txt"
    constraints.write_text(constraints_of(cell, (tree / "constraints.txt").read_text(encoding="utf-8")))
    newer = ["--upgrade", "--upgrade-strategy", "eager"] if upgrade else []
    command = [inside, "-m", "pip", "install", "--quiet", *newer, "-c", constraints, "-e", f"{tree}[dev]"]
    subprocess.run(command, check=True)
    return inside, look(inside)


def look(inside: Path) -> dict[str, str]:
    """The versions of an environment, once its torch and torchvision are known to go together."""
    ask = "import importlib.metadata as m; print(m.version('torch'), m.version('torchvision'))"
    found = subprocess.run([inside, "-c", ask], check=True, capture_output=True, text=True).stdout.split()
    refuse_local(*found)
    probe = subprocess.run([inside, "-c", PROBE % (SHOWN,)], check=False, capture_output=True, text=True)
    if probe.returncode:
        reason = (probe.stderr.strip().splitlines() or ["no message"])[-1]
        raise CellError(
            f"torch {found[0]} and torchvision {found[1]} do not go together ({reason}); "
            f"remove {inside.parent.parent} and run again"
        )
    versions: dict[str, str] = json.loads(probe.stdout)
    return versions


def refuse_local(torch: str, torchvision: str) -> None:
    """Refuse builds that PyPI does not have; with `2.13.0+cpu`, say, PyPI's torchvision has no compiled operators.

    Raises:
        CellError: If one of the versions has a local part.
    """
    for name, version in (("torch", torch), ("torchvision", torchvision)):
        if "+" in version:
            raise CellError(
                f"{name} {version} was installed, which is not PyPI's {version.partition('+')[0]}; "
                "unset PIP_FIND_LINKS and PIP_EXTRA_INDEX_URL, remove the environment and run again"
            )


def constraints_of(cell: Cell, pinned: str) -> str:
    """The constraints with which a cell is installed."""
    if cell.wanted == "pinned":
        return pinned
    if cell.wanted == "newest":
        return ""
    torch, vision = CAPPED.get(cell.wanted, (f"{cell.wanted}.0", f"{TORCHVISION[cell.wanted]}.0"))
    for name, version in (("torch", torch), ("torchvision", vision)):
        # Three signs compare letter by letter: `==2.13.0` would be met by a local build such as 2.13.0+cpu.
        pinned, found = re.subn(rf"^{name}==.*$", f"{name}==={version}", pinned, flags=re.MULTILINE)
        if found != 1:
            raise CellError(f"constraints.txt pins {name} {found} times; one is needed")
    return pinned


def run_tests(inside: Path, folder: Path, tests: list[str], processes: int) -> dict[str, int]:
    """How many tests passed, failed and were skipped; a run that does not end with a report counts as a failure."""
    tree, report = folder.resolve() / "tree", folder.resolve() / "report.xml"
    report.unlink(missing_ok=True)
    path = os.pathsep.join([str(tree), str(tree / "adapters")])
    bin_first = f"{inside.parent}{os.pathsep}{os.environ.get('PATH', '')}"
    variables = {**os.environ, "CI": "true", "HF_HUB_OFFLINE": "1", "PYTHONPATH": path, "PATH": bin_first}
    data = ROOT.parent / "shared" / "data"  # as .ci/run looks for it
    if data.is_dir():
        variables.setdefault("COCKTAIL_DATA", str(data))
    several = ["-n", str(processes), "--dist", "loadfile"] if processes > 1 else []
    command = [inside, "-m", "pytest", "-q", "-p", "no:cacheprovider", *several, f"--junitxml={report}", *tests]
    subprocess.run(command, cwd=tree, env=variables, check=False)  # counted below
    if not report.exists():
        raise CellError("pytest ended without a report; the process that ran it was killed, or crashed")
    suites = ET.parse(report).getroot().findall("testsuite")
    counts = {key: sum(int(s.get(key, 0)) for s in suites) for key in ("tests", "failures", "errors", "skipped")}
    failed = counts["failures"] + counts["errors"]
    passed = counts["tests"] - failed - counts["skipped"]
    if not passed:
        raise CellError("no test passed")
    return {"passed": passed, "failed": failed, "skipped": counts["skipped"]}


def interpreter(name: str) -> str:
    """Path of an interpreter such as ``python3.12``: on PATH, or the newest of pyenv's.

    Raises:
        CellError: If there is none.
    """
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    installed = [str(p / "bin" / name) for p in sorted(pyenv.glob(f"{name.removeprefix('python')}.*"), reverse=True)]
    for path in (shutil.which(name), *installed):  # a stand-in on PATH may lead to nothing
        if path and subprocess.run([path, "-c", ""], check=False, capture_output=True).returncode == 0:
            return path
    raise CellError(f"{name} was not found on PATH or among pyenv's versions; install it")


def folder_of(cell: Cell) -> str:
    """The name of a cell's folder."""
    return f"{cell.python}-torch-{cell.wanted}"


def keep_row(row: dict[str, Any]) -> None:
    """Put a row in the place of an earlier one of the same cell; the order is that of CELLS."""

    def place(r: dict[str, Any]) -> int:
        return [c.name for c in CELLS].index(cell_of(r))

    rows = json.loads(RESULTS.read_text(encoding="utf-8"))["rows"] if RESULTS.exists() else []
    known = {c.name for c in CELLS}
    others = [r for r in rows if cell_of(r) in known and cell_of(r) != cell_of(row)]
    rows = sorted([*others, row], key=place)
    RESULTS.write_text(json.dumps({"tests": TESTS, "rows": rows}, indent=1) + "\n", encoding="utf-8")


def cell_of(row: dict[str, Any]) -> str:
    """The name of the cell that a row is of."""
    return f"python{'.'.join(row['python'].split('.')[:2])}={row.get('cell', '')}"


if __name__ == "__main__":
    sys.exit(main())
