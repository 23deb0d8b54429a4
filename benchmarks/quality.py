"""How good the networks are: the method, its parts, what goes beyond it and its rivals, at equal training cost.

    python benchmarks/quality.py --data DATA                          everything that is missing, then the table
    python benchmarks/quality.py --data DATA --method paper cocktail --seeds 3 --minutes 60
    python benchmarks/quality.py --task digits --steps 230 --seeds 1  a quick try, without data
    python benchmarks/quality.py --table                              the table of what has been run

Every run is a process of its own. Stopped at any moment (or by ``--minutes``), the same command resumes each run where
it was. Rows are in ``benchmarks/results/quality.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from children import run_child
from quality_rows import KINDS, PATTERNS, RESULTS, Line, Row, Run, lines, methods, read, write
from quality_tasks import BATCH, RECALIBRATION, TASKS, Task
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch.nn import functional as F

import cocktailsdk as cocktail
from cocktailsdk.training.events import Callback


def trainer_of(
    run: Run, task: Task, steps: int, data: Path | None, out: Path | None, callbacks: Sequence[Callback] = ()
) -> tuple[cocktail.CoTrainer, object]:
    """The trainer of a run and its test batches."""
    method = methods()[run.method]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.seed)
        model = task.model()
    net = cocktail.sparsify(model, PATTERNS[run.pattern], example_inputs=(torch.zeros(2, *task.example),))
    loaders = task.loaders(data)
    trainer = cocktail.CoTrainer(
        net,
        loaders.train,
        F.cross_entropy,
        val_loader=loaders.merge,
        recipe=method.recipe,
        optimizer=task.optimizer,
        schedule=task.schedule,
        total_steps=round(steps * method.runs[run.pattern]),
        evaluation=cocktail.EvaluationSettings(recalibration_batches=RECALIBRATION),
        seed=run.seed,
        out_dir=out,
        callbacks=callbacks,
        output=cocktail.OutputSettings(config={"run": run.key, "steps": steps}),
    )
    return trainer, loaders.test


def measure(run: Run, steps: int, data: Path | None, out: Path | None) -> Row:
    """Trains a run, or what is left of it, and measures every network on the test set."""
    trainer, test = trainer_of(run, TASKS[run.task], steps, data, out)
    net = trainer.fit()
    history = trainer.history
    return {
        "task": run.task,
        "method": run.method,
        "pattern": run.pattern,
        "seed": run.seed,
        "budget": steps,
        "steps": history.steps,
        "passes": history.passes,
        "images": history.passes * BATCH,
        "seconds": round(history.seconds, 1),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} thread, torch {torch.__version__}",
        "command": f"python benchmarks/quality.py --data DATA --task {run.task} --method '{run.method}'",
        "fingerprint": trainer.fingerprint,
        "networks": {name: round(value, 5) for name, value in trainer.evaluate(test).items()},
        "parameters": sum(p.numel() for p in net.model.parameters()),
        "stored": trainer.parameters_stored,
        "alphas": history.alphas,
        "judged": history.judged,
        "rounds": [r.metrics for r in history.rounds],
        "overlap": _overlap(net),
    }


def _overlap(net: cocktail.CocktailNet) -> dict[str, float]:
    """By channel level, the share of weights kept by it or by unstructured of the same level that both keep."""
    names = {kind: [n for n in net.names if net.subnet(n).pattern == kind and n in net.masks] for kind in KINDS}
    out = {}
    for channel, single in zip(names["channel"], names["unstructured"], strict=False):
        both = either = 0
        a, b = net.mask_tensors(channel), net.mask_tensors(single)
        for weight in a.keys() & b.keys():
            x, y = torch.broadcast_tensors(a[weight] != 0, b[weight] != 0)
            both, either = both + int((x & y).sum()), either + int((x | y).sum())
        out[channel] = round(both / max(either, 1), 4)
    return out


def table(found: list[Line]) -> Table:
    """The lines, for people."""
    made = Table("task", "method", "steps", "seeds", "dense", *KINDS, "all sparse", "± seeds", "stored", "seconds")
    for x in found:
        cells = [None if v is None else f"{v:.2f}" for v in (*(x.means[k] for k in KINDS), x.sparse, x.spread)]
        shown = [c or "" for c in cells]
        row = [x.task, x.method, x.budget, x.seeds, f"{x.dense:.2f}", *shown, f"{x.stored:.2f} x", f"{x.seconds:.0f}"]
        made.add_row(*map(str, row))
    return made


def _child(run: Run, asked: argparse.Namespace, steps: int, deadline: float) -> Row | str | None:
    """A run in another process: its row, what went wrong, or ``None`` where time was up and it can be gone on with."""
    command = [
        sys.executable,
        __file__,
        "--run",
        run.task,
        run.method,
        run.pattern,
        str(run.seed),
        "--steps",
        str(steps),
    ]
    command += ["--out", str(asked.out)] + (["--data", str(asked.data)] if asked.data else [])
    return run_child(command, run.key, asked.threads, deadline)


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", nargs="*", choices=list(TASKS), default=["cifar"])
    parser.add_argument("--method", nargs="*", help="by default all")
    parser.add_argument("--seeds", type=int, default=1, help="seeds 0 … n - 1 of each")
    parser.add_argument("--steps", type=int, help="optimizer steps of a method's whole run; by default the task's")
    parser.add_argument("--data", type=Path, help="folder of CIFAR-10; by default $COCKTAIL_DATA/cifar10")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--threads", type=int, default=1, help="threads of each")
    parser.add_argument("--minutes", type=float, default=1e4, help="stop after so long; runs go on another time")
    parser.add_argument("--out", type=Path, default=Path("runs/quality"), help="where runs keep their state")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="run nothing")
    parser.add_argument("--run", nargs=4, metavar=("TASK", "METHOD", "PATTERN", "SEED"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.data is None and "COCKTAIL_DATA" in os.environ:
        asked.data = Path(os.environ["COCKTAIL_DATA"]) / "cifar10"
    if asked.run:
        task, method, pattern, seed = asked.run
        run = Run(task, method, pattern, int(seed))
        print(json.dumps(measure(run, asked.steps, asked.data, asked.out / f"{run.key}--{asked.steps}")))
        return 0
    known = methods()
    wrong = [m for m in asked.method or [] if m not in known]
    if wrong:
        parser.error(f"no method {', '.join(map(repr, wrong))}; there are {', '.join(map(repr, known))}")
    rows, console, failed = read(asked.results), Console(width=150), []
    todo = [
        (Run(task, method, pattern, seed), steps)
        for task in asked.task
        for steps in [asked.steps or TASKS[task].steps]
        for seed in range(asked.seeds)
        for method in asked.method or known
        for pattern in known[method].runs
        if not Run(task, method, pattern, seed).found_in(rows, steps)
    ]
    if not asked.table:
        deadline = time.monotonic() + 60 * asked.minutes
        columns = (TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=Console(stderr=True)) as bar, ThreadPoolExecutor(asked.jobs) as pool:
            shown = bar.add_task("training", total=len(todo))
            for row in pool.map(lambda t: _child(t[0], asked, t[1], deadline), todo):
                if isinstance(row, str):
                    failed.append(row)
                elif row is not None:
                    rows.append(row)
                    write(rows, asked.results)
                bar.advance(shown)
    console.print(table(lines(r for r in rows if r["task"] in asked.task)))
    for message in failed:
        console.print(message, style="red")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
