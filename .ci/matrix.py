"""Runs telling tests with other versions of Python and PyTorch, each in an environment of its own.

    python .ci/matrix.py python3.11=2.11 python3.11=newest python3.12=2.11 python3.12=newest [--keep FOLDER]

A cell is an interpreter and a release of torch; with it goes the newest of every other package that is asked for.
Each takes gigabytes for a while, and some minutes; the tests are those of the last commit. What came out goes into
benchmarks/results/versions.json, from which docs/make_tables.py writes the table of docs/install.md. Exits with 1 where
a test failed. With --keep environments stay in a folder, and are used again as they are.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "versions.json"
SHOWN = ("torch", "torchvision", "numpy", "transformers", "timm", "accelerate", "onnxruntime")
TESTS = [
    *("import", "public_api", "net_switch", "net_selection", "net_statistics", "net_threads", "net_views"),
    *("graph_rules", "graph_rules_attention", "bundle", "bundle_format", "slim_api", "patterns_registry"),
    *("training_trainer", "export", "notebooks"),
]


def main() -> int:
    """Run as a script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cells", nargs="+", metavar="PYTHON=TORCH", help="like python3.12=2.11 or python3.12=newest")
    parser.add_argument("--keep", type=Path, help="folder in which environments stay")
    options = parser.parse_args()
    failed = 0
    for cell in options.cells:
        python, found, torch = cell.partition("=")
        if not found:
            parser.error(f"{cell} is no PYTHON=TORCH")
        with tempfile.TemporaryDirectory() as work:
            row = run_cell(python, torch, options.keep or Path(work), Path(work))
        keep_row(row)
        print(json.dumps(row), flush=True)
        failed += row["failed"]
    return int(failed > 0)


def run_cell(python: str, torch: str, environments: Path, work: Path) -> dict[str, Any]:
    """One row of the table."""
    tree = work / "tree"
    tree.mkdir()
    archive = subprocess.run(["git", "archive", "HEAD"], check=True, cwd=ROOT, capture_output=True).stdout
    subprocess.run(["tar", "x", "-C", str(tree)], check=True, input=archive)
    environment = (environments / f"{Path(python).name}-torch-{torch}").resolve()
    inside = environment / ("Scripts" if os.name == "nt" else "bin") / "python"
    if not inside.exists():
        subprocess.run([python, "-m", "venv", str(environment)], check=True)
        pin = "torch" if torch == "newest" else f"torch=={torch}.*"
        wanted = [pin, f"{tree}[onnx]", "hypothesis", "pytest", "pytest-timeout"]
        subprocess.run([inside, "-m", "pip", "install", "--quiet", *wanted], check=True)
    report = work / "report.xml"
    tests = [f"tests/test_{name}.py" for name in TESTS]
    variables = {
        **os.environ,
        "CI": "true",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": f"{tree}{os.pathsep}{tree / 'adapters'}",
    }
    subprocess.run(
        [inside, "-m", "pytest", "-q", f"--junitxml={report}", *tests],
        cwd=tree,
        env=variables,
        check=False,  # counted below
    )
    suites = ET.parse(report).getroot().findall("testsuite")
    counts = {key: sum(int(s.get(key, 0)) for s in suites) for key in ("tests", "failures", "errors", "skipped")}
    ask = f"""
import importlib.metadata, json, platform
print(json.dumps({{"python": platform.python_version(), **{{n: importlib.metadata.version(n) for n in {SHOWN}}}}}))
"""
    versions = json.loads(subprocess.run([inside, "-c", ask], check=True, capture_output=True, text=True).stdout)
    failed = counts["failures"] + counts["errors"]
    passed = counts["tests"] - failed - counts["skipped"]
    return {**versions, "passed": passed, "failed": failed, "skipped": counts["skipped"]}


def keep_row(row: dict[str, Any]) -> None:
    """Put a row in the place of an earlier one with the same minor releases of Python and torch."""

    def place(r: dict[str, Any]) -> tuple[list[int], list[int]]:
        return minor(r["python"]), minor(r["torch"])

    rows = json.loads(RESULTS.read_text(encoding="utf-8"))["rows"] if RESULTS.exists() else []
    rows = sorted([r for r in rows if place(r) != place(row)] + [row], key=place)
    RESULTS.write_text(json.dumps({"tests": TESTS, "rows": rows}, indent=1) + "\n", encoding="utf-8")


def minor(version: str) -> list[int]:
    """``[3, 11]`` of ``3.11.7``."""
    return [int(part) for part in version.split(".")[:2]]


if __name__ == "__main__":
    sys.exit(main())
