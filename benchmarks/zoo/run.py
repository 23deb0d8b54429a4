"""Slim against masked over every timm family and 40 transformers types, beside Torch-Pruning.

    python benchmarks/zoo/run.py                          everything, then the table
    python benchmarks/zoo/run.py timm:resnet18 hf:bert    these only
    python benchmarks/zoo/run.py --table                  the table of what has been run

Each model runs in a process of its own, one contender after the other. Rows go to a file of JSON lines as they come:
stopped at any moment, the same command continues with what is missing.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from models import names
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rows import OURS, RESULTS, THEIRS, Row, read, summary, told

HERE = Path(__file__).resolve().parent


def measure(contender: str, model: str, seconds: int) -> Row:
    """A row, measured in another process."""
    failed: Row = {"contender": contender, "model": model, "ok": False, "equal": False}
    try:
        done = subprocess.run(
            [sys.executable, str(HERE / "check.py"), contender, model],
            capture_output=True,
            text=True,
            timeout=seconds,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {**failed, "error": f"not done after {seconds} s"}
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    return json.loads(lines[-1]) if lines else {**failed, "error": "died: " + done.stderr.strip()[-200:]}


def show(rows: dict[tuple[str, str], Row], chosen: list[str], console: Console) -> bool:
    """Prints the table and the sums; whether everything that was asked holds."""
    table = Table(
        "model", "ours: error, FLOPs kept", "group s", "slim s", "Torch-Pruning: error, FLOPs kept", "graph s"
    )
    for model in chosen:
        a, b = rows.get((OURS, model)), rows.get((THEIRS, model))
        if a or b:
            seconds = [str(r.get(k, "")) if r else "" for r, k in ((a, "group_s"), (a, "slim_s"), (b, "group_s"))]
            table.add_row(model, told(a), *seconds[:2], told(b), seconds[2])
    console.print(table)
    found = summary(rows, chosen)
    for line in found.lines():
        console.print(line)
    return found.fine


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help="timm:NAME or hf:TYPE; by default all")
    parser.add_argument("--contender", choices=[OURS, THEIRS], help="this one only; by default both")
    parser.add_argument("--seconds", type=int, default=240, help="limit for one model and contender")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--out", type=Path, default=RESULTS, help="file of JSON lines")
    parser.add_argument("--again", action="store_true", help="also what has been run")
    parser.add_argument("--table", action="store_true", help="run nothing")
    asked = parser.parse_args()
    chosen = asked.models or names()
    rows, console = read(asked.out), Console(width=140)
    who = [asked.contender] if asked.contender else [OURS, THEIRS]
    todo = [(c, m) for m in chosen for c in who if asked.again or (c, m) not in rows]
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    columns = (TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress, ThreadPoolExecutor(asked.jobs) as pool:
        task = progress.add_task("measuring", total=0 if asked.table else len(todo))
        for row in pool.map(lambda t: measure(*t, asked.seconds), [] if asked.table else todo):
            with asked.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            rows[row["contender"], row["model"]] = row
            progress.update(task, advance=1, description=row["model"])
    return 0 if show(rows, chosen, console) else 1


if __name__ == "__main__":
    sys.exit(main())
