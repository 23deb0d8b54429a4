"""The tables of the page on scores: subnetworks of trained models without training."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "one_shot.json"


def one_shot_block() -> str:
    """For SmolLM2 what is to be reached; for each task every score, and plain versions of published methods."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from one_shot_pieces import TASKS
    from one_shot_rows import methods_table, target_table
    from result_rows import read_rows

    if not RESULTS.is_file():
        return ""
    rows = read_rows(RESULTS)
    out = ["What the scores are to reach on SmolLM2, and what they reach (perplexity):", "", target_table(rows), ""]
    for task in TASKS.values():
        if any(row["task"] == task.name for row in rows):
            out += [f"**{task.title}**: {task.metric}.", "", methods_table(rows, task), ""]
    machines = sorted({row["machine"] for row in rows})
    return "\n".join([*out, f"Command: `python benchmarks/one_shot.py --data DIR`. {', '.join(machines)}.", ""])
