"""What each subnetwork of ResNet-50 truly saves in four runtimes, on two cores.

    python benchmarks/deploy.py                                  everything that is missing, then the table
    python benchmarks/deploy.py --runtimes onnxruntime --again   this runtime anew
    python benchmarks/deploy.py --table                          the table of what has been measured

Torch eager, ``torch.compile``, onnxruntime and OpenVINO, all in float32 with as many threads, run the dense network and
a subnetwork by turns; a figure is the median over turns of dense time by the subnetwork's. Channel networks are slim,
the others hold zeros. Weights are random, which changes no time. Rows are kept one by one in
``benchmarks/results/deploy.json``, exported networks in ``--files``, so that the same command resumes where it was
stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import torch
from deploy_rows import GOAL, RUNTIMES_WANTED, WANTED, goal, in_order

import cocktailsdk as cocktail
from cocktailsdk.io.atomic import write_json

RESULTS = Path(__file__).resolve().parent / "results" / "deploy.json"
MODEL, SIDE = "resnet50", 224
PATTERNS = ("channel", "n:m", "unstructured")

PAUSE = 0.1
"""Seconds before a network runs: threads of the one before go on looking for work for a while, and take its cores."""

Call = Callable[[], object]
"""One forward pass."""

Work = tuple[str, list[str]]
"""A runtime, and networks to measure in it."""


def build(patterns: list[str]) -> cocktail.CocktailNet:
    """ResNet-50 with random weights and these patterns' networks."""
    import timm

    torch.manual_seed(0)
    return cocktail.sparsify(timm.create_model(MODEL).eval(), patterns, (torch.randn(1, 3, SIDE, SIDE),))


def eager(net: cocktail.CocktailNet, name: str, _files: Path, batch: torch.Tensor, _threads: int) -> Call:
    """The model itself: slim, or with the subnetwork's zeros in it."""
    model = net.slim(name).eval()
    return lambda: model(batch)


def compiled(net: cocktail.CocktailNet, name: str, _files: Path, batch: torch.Tensor, _threads: int) -> Call:
    """The same compiled. Networks without slim layers share one compilation; their zeros are put in its weights."""
    if net.masks.get(name) is not None and net.masks[name].removed is not None:
        model = torch.compile(net.slim(name).eval())
        return lambda: model(batch)
    net.model.eval()
    shared = net.__dict__.setdefault("_compiled", torch.compile(net.model))

    def call() -> object:
        if net.active != name:
            raise RuntimeError("switch first")
        return shared(batch)

    return call


def onnxruntime(net: cocktail.CocktailNet, name: str, files: Path, batch: torch.Tensor, threads: int) -> Call:
    """The exported ONNX file."""
    from cocktailsdk.exporting.onnx_file import session

    run = session(exported(net, name, files), threads)
    return lambda: run({"x": batch})


def openvino(net: cocktail.CocktailNet, name: str, files: Path, batch: torch.Tensor, threads: int) -> Call:
    """The same file in OpenVINO."""
    from cocktailsdk.exporting.openvino_file import compiled as load

    run = load(exported(net, name, files), threads)
    return lambda: run({"x": batch})


RUNTIMES = {"onnxruntime": onnxruntime, "torch eager": eager, "openvino": openvino, "torch.compile": compiled}


def exported(net: cocktail.CocktailNet, name: str, files: Path) -> Path:
    """A subnetwork's ONNX file, written and checked where it is not there."""
    file = files / f"{name.replace(':', '-')}.onnx"
    if not file.is_file():
        net.export(name, file)
    return file


def all_rows(
    work: list[tuple[str, list[str]]], files: Path, batch_size: int, threads: int, turns: int
) -> Iterator[dict]:
    """Measure networks, runtime by runtime."""
    torch.set_num_threads(1)  # what is not timed; on a busy machine threads wait for each other
    wanted = {name for _, names in work for name in names}
    patterns = list(dict.fromkeys(p for name, p in network_names().items() if name in wanted))
    net, batch = build(patterns), torch.randn(batch_size, 3, SIDE, SIDE)
    for runtime, names in work:
        yield from rows_of(net, runtime, names, files, batch, threads, turns)


def rows_of(
    net: cocktail.CocktailNet,
    runtime: str,
    names: list[str],
    files: Path,
    batch: torch.Tensor,
    threads: int,
    turns: int,
) -> Iterator[dict]:
    """Measure networks in one runtime, each by turns with the dense one."""
    reports = {s.name: s for s in net.subnets()}
    dense = RUNTIMES[runtime](net, "dense", files, batch, threads)
    for name in names:
        call = RUNTIMES[runtime](net, name, files, batch, threads)
        seen: list[tuple[float, float, float, float]] = []
        torch.set_num_threads(threads)
        with torch.inference_mode(mode=runtime == "torch eager"), torch.no_grad():
            for turn in range(turns + 2):
                a = timed(dense, net, "dense" if runtime == "torch.compile" else None)
                b = timed(call, net, name if runtime == "torch.compile" else None)
                if turn >= 2:  # the first ones compile and allocate
                    seen.append((*a, *b))
        del call
        torch.set_num_threads(1)
        net.switch("dense")
        yield {
            "runtime": runtime,
            "network": name,
            "pattern": reports[name].pattern,
            "flops": reports[name].flops / reports["dense"].flops,
            "ratio": round(median(a / b for a, _, b, _ in seen), 3),
            "ratio_processor": round(median(a / b for _, a, _, b in seen), 3),
            "ms": round(1e3 * median(b for _, _, b, _ in seen), 2),
            "dense_ms": round(1e3 * median(a for a, _, _, _ in seen), 2),
            "turns": turns,
            "batch": len(batch),
            "threads": threads,
        }


def timed(call: Call, net: cocktail.CocktailNet, active: str | None) -> tuple[float, float]:
    """Seconds of the clock and of all processors of one call, after another that is not counted."""
    if active is not None and net.active != active:
        slim = net.masks.get(active) is not None and net.masks[active].removed is not None
        net.switch("dense" if slim else active)
    time.sleep(PAUSE)
    call()
    wall, processor = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - wall, time.process_time() - processor


def environment_of() -> dict[str, Any]:
    """Machine, versions and command."""
    import onnxruntime as ort
    import openvino as ov
    import timm

    return {
        "command": " ".join(["python", "benchmarks/deploy.py", *sys.argv[1:]]),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "onnxruntime": ort.__version__,
        "openvino": ov.__version__.partition("-")[0],
        "python": platform.python_version(),
        "cocktailsdk": cocktail.__version__,
        "date": datetime.now(UTC).date().isoformat(),
    }


def read() -> list[dict[str, Any]]:
    """The rows measured so far."""
    return json.loads(RESULTS.read_text(encoding="utf-8"))["rows"] if RESULTS.is_file() else []


def keep(row: dict[str, Any]) -> None:
    """Put a row in the place of an earlier one."""
    same = ("runtime", "network", "batch", "threads")
    rows = [r for r in read() if any(r[k] != row[k] for k in same)] + [row]
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    write_json(RESULTS, {"model": MODEL, "rows": rows})


def show() -> None:
    """The table."""
    from rich.console import Console
    from rich.table import Table

    rows = read()
    runtimes = [r for r in RUNTIMES if any(row["runtime"] == r for row in rows)]
    table = Table("network", "FLOPs", *runtimes, title="times as fast as the dense network")
    for name, mine in in_order(rows).items():
        flops = next(iter(mine.values()))["flops"]
        table.add_row(name, f"{flops:.0%}", *(f"{mine[r]['ratio']:.2f}" if r in mine else "" for r in runtimes))
    Console().print(table)
    met, found = goal(rows)
    print(f"{GOAL}: {found}; at least {WANTED} in {met} runtimes, wanted {RUNTIMES_WANTED}")


def main() -> None:
    """Run as a script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runtimes", nargs="+", choices=RUNTIMES, default=list(RUNTIMES))
    parser.add_argument("--networks", nargs="+", help="only these")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--files", type=Path, default=Path("runs/deploy"), help="where exported networks lie")
    parser.add_argument("--again", action="store_true", help="measure anew what is there")
    parser.add_argument("--table", action="store_true", help="measure nothing")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one is not None:
        for row in all_rows(**json.loads(options.one), files=options.files):
            print("ROW", json.dumps(row), flush=True)
        return
    if not options.table:
        names = network_names()
        unknown = [n for n in options.networks or () if n not in names]
        if unknown:
            parser.error(f"no networks are named {', '.join(unknown)}; there are {', '.join(names)}")
        for pattern in dict.fromkeys(names.values()):  # a process for each: masks of others need not be made
            work = []
            for runtime in options.runtimes:
                done = {r["network"] for r in read() if is_of(r, runtime, options)} if not options.again else set()
                wanted = [n for n in options.networks or names if names[n] == pattern and n not in done]
                if wanted:
                    work.append((runtime, wanted))
            if work:
                measure(work, options)
    show()


def is_of(row: dict[str, Any], runtime: str, options: argparse.Namespace) -> bool:
    """Whether a row was measured in a runtime with these options."""
    return (row["runtime"], row["batch"], row["threads"]) == (runtime, options.batch, options.threads)


def network_names() -> dict[str, str]:
    """The networks and their patterns, that of the goal first."""
    from cocktailsdk.patterns import resolve_patterns

    names = {s.name: p.name for p in resolve_patterns(PATTERNS) for s in p.subnets()}
    return {GOAL: names.pop(GOAL), **names}


def measure(work: list[Work], options: argparse.Namespace) -> None:
    """All in a process of its own; every row is kept as soon as it is there."""
    given = {"work": work, "batch_size": options.batch, "threads": options.threads, "turns": options.turns}
    command = [sys.executable, __file__, "--files", str(options.files), "--one", json.dumps(given)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
    about = environment_of()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if not line.startswith("ROW "):
                continue
            load = os.getloadavg()[0] if hasattr(os, "getloadavg") else -1.0
            row = {**json.loads(line[4:]), "environment": {**about, "load": round(load, 1)}}
            keep(row)
            print(f"{row['runtime']}: {row['network']} {row['ratio']:.2f} times as fast", flush=True)
    if process.returncode:
        raise SystemExit(f"measuring failed with exit code {process.returncode}")


if __name__ == "__main__":
    main()
