"""The tables of docs/trained.md, and the line of README.md on accuracy from trained weights."""

from __future__ import annotations

import sys
from pathlib import Path
from statistics import mean

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "trained.json"


def trained_block() -> str:
    """For each task every run, the runs alone, and for ResNet-20 the targets."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from trained_rows import alone_table, read_rows, run_table, target_table
    from trained_tasks import TASKS

    if not RESULTS.is_file():
        return ""
    rows, out = read_rows(RESULTS), []
    for task in TASKS.values():
        if not any(row["task"] == task.name for row in rows):
            continue
        out += [f"**{task.title}**: test accuracy in %.", "", run_table(rows, task.name), ""]
        out += ["Each subnetwork by itself:", "", alone_table(rows, task.name), ""]
    out += ["What the default is to reach on ResNet-20, and what it reaches:", "", target_table(rows), ""]
    machines = sorted({row["machine"] for row in rows})
    return "\n".join([*out, f"Command: `python benchmarks/trained.py --data DIR`. {', '.join(machines)}.", ""])


def trained_line() -> list[str]:
    """A row of the README's table; none before there are runs of the default."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from trained_rows import B, curves, means, rate_of, read_rows

    rows = [r for r in read_rows(RESULTS) if r["task"] == "resnet20"] if RESULTS.is_file() else []
    ours = [r for r in rows if (r["run"], r["budget"]) == ("ours", B)]
    start = next((r["accuracies"] for r in rows if r["run"] == "start"), None)
    if not ours or start is None:
        return []
    alone, found = curves(rows), means(ours)
    rates = [x.rate for r in ours if (x := rate_of(r, alone)) is not None]
    shown = ", ".join(f"{name} {found[name]:.1f} %" for name in ("2:4", "unstructured@0.893", "channel@0.469"))
    worth = f"; each alone would need {mean(rates):.0f} times as many passes in all" if rates else ""
    return [
        f"| Accuracy from trained weights | ResNet-20 on CIFAR-10 (JPEG), {B} passes for all 24 networks: dense "
        f"{found['dense']:.1f} % (before: {start['dense']:.1f} %), {shown}{worth} | [trained weights](trained.md) |"
    ]
