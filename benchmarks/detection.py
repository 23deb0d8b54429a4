"""Detectors: all networks from one run beside MutualNet, and distillation beside none, at equal steps.

    python benchmarks/detection.py                                    everything that is missing, then the table
    python benchmarks/detection.py --task bccd --method cocktail mutualnet --minutes 30
    python benchmarks/detection.py --task bccd --steps 60 --test 8    a quick try
    python benchmarks/detection.py --table                            the table of what has been run
    python benchmarks/detection.py --task bccd-full nuclei-full bccd-full-vgg nuclei-full-vgg --method cocktail \\
        mutualnet --seeds 3 --steps 6000 --device cuda --jobs 1       whole images and the paper's backbones, on a GPU

COCKTAIL_DATA names the folder that holds bccd/ and nuclei_dsb2018/. Tasks without "full" are for a processor. Every
run is a process of its own; stopped at any moment (or by --minutes), the same command resumes each run where it was.
Rows are in benchmarks/results/detection.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from children import run_child
from detection_rows import KINDS, METHODS, RESULTS, TASKS, Line, Row, lines, paper_gap, read, write
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from cocktailsdk import CocktailError
from cocktailsdk.io.atomic import write_atomic
from cocktailsdk.utils.devices import available_device

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "detectron_style"
sys.path.append(str(EXAMPLE))


def measure(task: str, method: str, seed: int, steps: int, test: int, out: Path, device: str = "cpu") -> Row:
    """Trains a run, or what is left of it, and measures every network on the test set."""
    from cocktail_detection.catalog import register_builtin
    from cocktail_detection.config import get_cfg
    from cocktail_detection.engine import Setup, measured, trainer_of
    from cocktail_detection.tables import jsonable

    cfg = get_cfg()
    cfg.merge_from_file(EXAMPLE / "configs" / TASKS[task].config)
    cfg.merge_from_list([*TASKS[task].settings, *METHODS[method]])
    cfg.merge_from_list(["SEED", str(seed), "SOLVER.MAX_ITER", str(steps), "TEST.MAX_IMAGES", str(test)])
    cfg.merge_from_list(["MODEL.DEVICE", device])
    cfg.OUTPUT_DIR = str(out)
    register_builtin()
    setup = Setup.of(cfg)
    net = setup.net()
    flops = {report.name: report.flops for report in net.subnets()}
    trainer = trainer_of(setup, net)
    trainer.fit()
    history, partial = trainer.history, out / "networks.json"
    networks = json.loads(partial.read_text(encoding="utf-8")) if partial.exists() else {}
    for name in net.names:  # a network at a time, so that a run that is stopped here goes on here
        if name not in networks:
            cfg.TEST.NETWORKS = [name]
            networks[name] = jsonable(measured(setup, net, trainer.using)[name])
            write_atomic(partial, json.dumps(networks).encode())
    command = f"python benchmarks/detection.py --steps {steps} --task {task} --method '{method}'"
    dense = [losses["dense"] for r in history.rounds for losses in r.losses if "dense" in losses]
    return {
        "task": task,
        "method": method,
        "seed": seed,
        "budget": steps,
        "test": test,
        "steps": history.steps,
        "passes": history.passes,
        "images": history.passes * cfg.SOLVER.IMS_PER_BATCH,
        "seconds": round(history.seconds, 1),
        "machine": f"{_machine(device)}, torch {torch.__version__}",
        "command": command if device == "cpu" else f"{command} --device {device}",
        "fingerprint": trainer.fingerprint,
        "losses": [round(dense[0], 4), round(dense[-1], 4)],
        "networks": {name: {k: _rounded(v) for k, v in found.items()} for name, found in networks.items()},
        "flops": flops,
        "parameters": sum(p.numel() for p in net.model.parameters()),
    }


def _machine(device: str) -> str:
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()}, {torch.get_num_threads()} thread"


def _rounded(figures: dict[str, float | None]) -> dict[str, float | None]:
    return {name: None if value is None else round(value, 3) for name, value in figures.items()}


def table(found: list[Line]) -> Table:
    """The lines, for people."""
    made = Table("task", "method", "", "seeds", "steps", "passes", "dense", *KINDS, "gap", "paper's gap", "minutes")
    for x in found:
        paper = paper_gap(x.kind, TASKS[x.task].paper, x.method)
        cells = [x.task, x.method, "box" if x.kind == "bbox" else "mask", x.seeds, x.steps, x.passes, f"{x.dense:.1f}"]
        cells += ["" if v is None else f"{v:.1f}" for v in (*(x.means[k] for k in KINDS), x.gap, paper)]
        made.add_row(*map(str, cells), f"{x.seconds / 60:.0f}")
    return made


def _child(task: str, method: str, seed: int, asked: argparse.Namespace, deadline: float) -> Row | str | None:
    """A run in another process: its row, what went wrong, or ``None`` where time was up and it can be gone on with."""
    command = [sys.executable, __file__, "--run", task, method, str(seed), "--steps", str(asked.steps)]
    command += ["--test", str(asked.test), "--out", str(asked.out), "--device", asked.device]
    return run_child(command, f"{task}, {method}, {seed}", asked.threads, deadline)


def _folder(asked: argparse.Namespace, task: str, method: str, seed: int) -> Path:
    words = f"{task}--{method}--{seed}--{asked.steps}--{asked.test}".replace(", ", "-").replace(" ", "_")
    return asked.out / words


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", nargs="*", choices=list(TASKS), help="by default bccd and nuclei; of --table all")
    parser.add_argument("--method", nargs="*", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--seeds", type=int, default=1, help="seeds 0 … n - 1 of each")
    parser.add_argument("--steps", type=int, default=600, help="optimizer steps of a run")
    parser.add_argument("--test", type=int, default=0, help="test images that count; by default all")
    parser.add_argument("--device", default="cpu", help="such as cuda; by default %(default)s")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--threads", type=int, default=1, help="threads of each")
    parser.add_argument("--minutes", type=float, default=1e4, help="stop after so long; runs go on another time")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/detection_benchmark"), help="where runs keep their state"
    )
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="run nothing")
    parser.add_argument("--run", nargs=3, metavar=("TASK", "METHOD", "SEED"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if not asked.table:
        try:
            available_device(asked.device, of="--device ")
        except CocktailError as error:
            parser.error(str(error))
    if asked.run:
        task, method, seed = asked.run
        folder = _folder(asked, task, method, int(seed))
        print(json.dumps(measure(task, method, int(seed), asked.steps, asked.test, folder, asked.device)))
        return 0
    if not asked.table and "COCKTAIL_DATA" not in os.environ:
        parser.error("the variable COCKTAIL_DATA must name the folder that holds bccd/ and nuclei_dsb2018/")
    tasks = asked.task or (list(TASKS) if asked.table else ["bccd", "nuclei"])
    rows, console, failed = read(asked.results), Console(width=150), []
    done = {(r["task"], r["method"], r["seed"], r["budget"], r["test"]) for r in rows}
    todo = [
        (task, method, seed)
        for seed in range(asked.seeds)
        for task in tasks
        for method in asked.method
        if (task, method, seed, asked.steps, asked.test) not in done
    ]
    if not asked.table:
        deadline = time.monotonic() + 60 * asked.minutes
        columns = (TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=Console(stderr=True)) as bar, ThreadPoolExecutor(asked.jobs) as pool:
            shown = bar.add_task("training", total=len(todo))
            for run, row in zip(todo, pool.map(lambda t: _child(*t, asked, deadline), todo), strict=True):
                if isinstance(row, str):
                    failed.append(row)
                elif row is not None:
                    rows.append(row)
                    write(rows, asked.results)
                    shutil.rmtree(_folder(asked, *run), ignore_errors=True)
                bar.advance(shown)
    console.print(table(lines(r for r in rows if r["task"] in tasks)))
    for message in failed:
        console.print(message, style="red")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
