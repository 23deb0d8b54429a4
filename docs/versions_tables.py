"""The table of docs/install.md: with which versions tests were run (.ci/matrix.py)."""

from __future__ import annotations

import json
from pathlib import Path

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results" / "versions.json"
WORDS = ("python", "torch", "torchvision", "numpy", "transformers", "timm", "tests")
COUNTS = ("passed", "failed", "skipped")


def versions_block() -> str:
    """A row for each Python and PyTorch."""
    rows = json.loads(RESULTS.read_text(encoding="utf-8"))["rows"] if RESULTS.is_file() else []
    if not rows:
        return "Not run yet: `python .ci/matrix.py`.\n"
    columns = (*WORDS, *COUNTS)
    lines = [f"| {' | '.join(columns)} |", f"|{' --- |' * len(WORDS)}{' --: |' * len(COUNTS)}"]
    lines += [f"| {' | '.join(str(row.get(c, 'selection')) for c in columns)} |" for row in rows]
    return "\n".join(lines) + "\n"
