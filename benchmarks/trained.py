"""From trained weights: what one shared run gives each subnetwork, against training each alone.

    python benchmarks/trained.py --data DATA                        every piece that is missing, then the tables
    python benchmarks/trained.py --data DATA --only ours --seeds 0  some pieces
    python benchmarks/trained.py --data DATA --only long --minutes 20
    python benchmarks/trained.py --list                             the pieces, and how many of their runs are done
    python benchmarks/trained.py --table                            the tables of what has been run

DATA holds the folders ``cifar10`` and ``resnet_cifar10``. A run that is stopped at any moment (or by ``--minutes``)
is resumed by the same command. Rows are in ``benchmarks/results/trained.json``.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from result_rows import read_rows
from trained_pieces import PIECES, Piece, effnet_pieces, long_pieces
from trained_rows import RESULTS, add_row, alone_table, run_table, target_table
from trained_runs import CoTrained, Place, Run
from trained_tasks import TASKS

LONG_PASSES = 20_000
"""About 70 minutes on one thread in bfloat16; in single precision it would be 105."""


def pieces(long_passes: int) -> dict[str, Piece]:
    """All pieces by name."""
    return PIECES | effnet_pieces() | long_pieces(long_passes)


def missing(piece: Piece, results: Path, seeds: list[int]) -> Run | None:
    """The next run of a piece that has no row."""
    rows = read_rows(results)
    done = {(r["task"], r["key"]) for r in rows}
    return next((run for run in piece.runs(rows, seeds) if (piece.task, run.key) not in done), None)


def listed(known: Mapping[str, Piece], results: Path, seeds: list[int]) -> str:
    """A line for each piece."""
    rows = read_rows(results)
    done = {(r["task"], r["key"]) for r in rows}
    lines = []
    for name, piece in known.items():
        try:
            runs = [(piece.task, run.key) for run in piece.runs(rows, seeds)]
            state = f"{len(done.intersection(runs))} of {len(runs)}"
        except SystemExit as error:
            state = str(error)
        lines.append(f"{name:30} {piece.title:52} {state}")
    return "\n".join(lines)


def tables(results: Path) -> str:
    """All tables, as Markdown."""
    rows = read_rows(results)
    parts = []
    for task in TASKS.values():
        if any(r["task"] == task.name for r in rows):
            parts += [f"**{task.title}**", run_table(rows, task.name), alone_table(rows, task.name)]
    parts += [target_table(rows)]
    return "\n\n".join(parts)


def run_piece(name: str, piece: Piece, asked: argparse.Namespace, deadline: float) -> None:
    """Make the runs of a piece that are missing.

    Raises:
        KeyboardInterrupt: Time is up; the run is saved.
    """
    if lacking := [p for p in TASKS[piece.task].needs if importlib.util.find_spec(p) is None]:
        print(f"{name}: skipped, since {lacking[0]} is not installed: pip install --no-deps {lacking[0]}")
        return
    place = Place(TASKS[piece.task], asked.data, asked.work, deadline)
    while (run := missing(piece, asked.results, asked.seeds)) is not None:
        if time.monotonic() > deadline:
            raise KeyboardInterrupt
        key = run.key
        if asked.recipe is not None and isinstance(run, CoTrained) and run.recipe is None:
            run = replace(run, recipe=asked.recipe)
        print(f"{time.strftime('%H:%M:%S')} {name}: {key}", flush=True)
        row = {"piece": name, **run.row(place), "key": key}
        add_row(row, asked.results)
        print("  ", *(f"{n} {v:.2f}" for n, v in row["accuracies"].items()), f"{row['cpu_seconds']} s", flush=True)


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("COCKTAIL_DATA"), help="or $COCKTAIL_DATA")
    parser.add_argument("--only", nargs="+", metavar="PIECE", help="by default all but those of the long task")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of ours and of the default before")
    parser.add_argument("--recipe", help="train ours by this recipe, not by the trainer's default")
    parser.add_argument("--long-passes", type=int, default=LONG_PASSES, help="student passes of the long task's runs")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="save and stop after so long")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, default=Path("runs/trained"), help="run states and adapted weights")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--list", action="store_true", help="run nothing, list the pieces")
    parser.add_argument("--table", action="store_true", help="run nothing, print the tables")
    asked = parser.parse_args()
    known = pieces(asked.long_passes)
    if unknown := [name for name in asked.only or () if name not in known]:
        parser.error(f"no piece {', '.join(map(repr, unknown))}; there are {', '.join(map(repr, known))}")
    if asked.list or asked.table:
        print(listed(known, asked.results, asked.seeds) if asked.list else tables(asked.results))
        return 0
    if asked.data is None:
        print("skipped: CIFAR-10 and trained weights are needed; give --data FOLDER or set COCKTAIL_DATA")
        return 0
    asked.data = Path(asked.data)
    torch.set_num_threads(asked.threads)
    deadline = time.monotonic() + 60 * asked.minutes
    try:
        for name in asked.only or [n for n, piece in known.items() if piece.task != "long"]:
            run_piece(name, known[name], asked, deadline)
    except KeyboardInterrupt:
        print("saved; the same command resumes")
        return 3
    print(tables(asked.results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
