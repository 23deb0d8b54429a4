"""What merging costs, against the full search that it gives the shares of, and what each exact device saves.

    python benchmarks/merging.py --data DATA            ResNet-8 on CIFAR-10
    python benchmarks/merging.py --task digits --steps 230

Trains a run of ``recipe="paper"`` once, up to its merging, and keeps it there; then merges it again and again, each
time with one device more: networks known from the round before at share 1 are not judged again; a share that can no
longer win is given up; parts of the held-out set, what is missed most first. All must choose the same shares. Repeats
are interleaved; ratios are of the fastest. The row is in ``benchmarks/results/merging.json``.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Any
from unittest import mock

import torch
from quality import trainer_of
from quality_rows import Run
from quality_tasks import TASKS
from rich.console import Console
from rich.table import Table

import cocktailsdk as cocktail
from cocktailsdk.io.atomic import write_json
from cocktailsdk.training.events import AlphaChosen, Event, MergeStarted
from cocktailsdk.training.merge import candidates, merging
from cocktailsdk.training.merge.alpha_search import Choice, choose_alpha
from cocktailsdk.training.metrics import Score

RESULTS = Path(__file__).resolve().parent / "results" / "merging.json"


def exhaustive(alphas: Any, cells: Any, judge: Any, known: Any, judged: Any, **_: Any) -> Choice:
    """Every network at every share, but for what is known."""
    table = {a: {c: known.get((a, c)) or judge(a, c) for c in cells} for a in sorted(set(alphas), reverse=True)}
    means = {a: sum(score.value for score in row.values()) / len(cells) for a, row in table.items()}
    alpha = max(means, key=lambda a: (means[a], a))
    return Choice(alpha, means[alpha], table[alpha])


def full(alphas: Any, cells: Any, judge: Any, known: Any, judged: Any, **_: Any) -> Choice:
    """Every network at every share."""
    return exhaustive(alphas, cells, judge, {}, judged)


def bounded(alphas: Any, cells: Any, judge: Any, known: Any, judged: Any, **_: Any) -> Choice:
    """Shares are given up; networks are judged on the whole held-out set."""
    return choose_alpha(alphas, cells, judge, known, judged)


DEVICES = {
    "full search": (full, False),
    "known at share 1": (exhaustive, False),
    "given up early": (bounded, False),
    "in parts, hardest first": (choose_alpha, True),
}
"""By name, the search and whether the held-out set is parted."""


@contextlib.contextmanager
def device(name: str) -> Iterator[list[dict[tuple[float, Any], Score]]]:
    """Merging with the devices up to one; gives a list that gets what each search judged, by share and cell."""
    search, parted = DEVICES[name]
    judged: list[dict[tuple[float, Any], Score]] = []

    def counted(alphas: Any, cells: Any, judge: Any, *rest: Any, **options: Any) -> Choice:
        found: dict[tuple[float, Any], Score] = {}
        judged.append(found)

        def told(alpha: float, cell: Any) -> Score:
            found[alpha, cell] = score = judge(alpha, cell)
            return score

        choice: Choice = search(alphas, cells, told, *rest, **options)
        return choice

    with mock.patch.object(candidates, "choose_alpha", counted):
        if parted:
            yield judged
        else:
            with mock.patch.object(merging, "_arrange", return_value=None):
                yield judged


class Watch:
    """When merging began and ended; ends the run there, or before it, as Ctrl-C would."""

    def __init__(self, *, before: bool = False) -> None:
        self.before, self.rounds, self.began, self.ended = before, 0, 0.0, 0.0

    def __call__(self, event: Event) -> None:
        """A callback."""
        if isinstance(event, MergeStarted):
            self.rounds, self.began = event.rounds, time.perf_counter()
            if self.before:
                raise KeyboardInterrupt
        if isinstance(event, AlphaChosen) and event.round == self.rounds:
            self.ended = time.perf_counter()
            raise KeyboardInterrupt


def run_until(watch: Watch, asked: argparse.Namespace, folder: Path) -> cocktail.CoTrainer:
    """Goes on with the run in a folder until the watch ends it."""
    run = Run(asked.task, "paper", "all", asked.seed)
    steps = asked.steps or TASKS[asked.task].steps
    trainer, _ = trainer_of(run, TASKS[asked.task], steps, asked.data, folder, (watch,))
    with contextlib.suppress(KeyboardInterrupt):
        trainer.fit()
    return trainer


def merged(asked: argparse.Namespace, trained: Path, name: str) -> dict[str, Any]:
    """Merges a copy of the trained run."""
    with tempfile.TemporaryDirectory() as folder, device(name) as judged:
        shutil.copytree(trained, Path(folder) / "run")
        watch = Watch()
        history = run_until(watch, asked, Path(folder) / "run").history
    return {
        "seconds": round(watch.ended - watch.began, 3),
        "alphas": history.alphas,
        "judged": sum(len({(alpha, network) for alpha, (network, _) in found}) for found in judged),
        "curves": [_means(found) for found in judged] if name == "full search" else None,
        "to_judge": history.to_judge,
    }


def _means(found: dict[tuple[float, Any], Score]) -> dict[str, float]:
    """The mean held-out metric of a round's networks at every share."""
    return {
        f"{alpha:g}": round(float(mean(score.value for (a, _), score in found.items() if a == alpha)), 5)
        for alpha in sorted({alpha for alpha, _ in found})
    }


def table(row: dict[str, Any]) -> Table:
    """The row, for people."""
    found = row["devices"]
    whole = found["full search"]
    made = Table("merging with", "networks judged", "seconds", "of the full search", title=row["title"])
    for name, values in found.items():
        share = values["seconds"] / whole["seconds"]
        made.add_row(name, f"{values['judged']} of {values['to_judge']}", f"{values['seconds']:.1f}", f"{share:.2f}")
    return made


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=list(TASKS), default="cifar")
    parser.add_argument("--data", type=Path, help="folder of CIFAR-10; by default $COCKTAIL_DATA/cifar10")
    parser.add_argument("--steps", type=int, help="of the whole run; by default the task's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/merging"), help="where the trained run is kept")
    parser.add_argument("--results", type=Path, default=RESULTS)
    asked = parser.parse_args()
    if asked.data is None and "COCKTAIL_DATA" in os.environ:
        asked.data = Path(os.environ["COCKTAIL_DATA"]) / "cifar10"
    console = Console(width=120)
    trained = asked.out / f"{asked.task}-{asked.seed}-{asked.steps or TASKS[asked.task].steps}"
    console.print("training up to merging, or going on with that")
    run_until(Watch(before=True), asked, trained)
    found: dict[str, dict[str, Any]] = {}
    for _ in range(asked.repeats):
        for name in DEVICES:
            values = merged(asked, trained, name)
            if name not in found or values["seconds"] < found[name]["seconds"]:
                found[name] = values
    chosen = {name: values["alphas"] for name, values in found.items()}
    row = {
        "title": TASKS[asked.task].title,
        "task": asked.task,
        "seed": asked.seed,
        "steps": asked.steps or TASKS[asked.task].steps,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} thread, torch {torch.__version__}",
        "command": f"python benchmarks/merging.py --task {asked.task}",
        "same": all(alphas == chosen["full search"] for alphas in chosen.values()),
        "devices": found,
    }
    asked.results.parent.mkdir(parents=True, exist_ok=True)
    write_json(asked.results, row)
    console.print(table(row))
    console.print(f"shares: {chosen['full search']}" if row["same"] else f"shares differ: {chosen}")
    return 0 if row["same"] else 1


if __name__ == "__main__":
    sys.exit(main())
