"""What the engine costs: steps against plain training, masks against the usual way, and how both grow.

    python benchmarks/engine.py                          everything that is missing, then the table
    python benchmarks/engine.py --parts step umg         these parts
    python benchmarks/engine.py --parts umg --again      these anew
    python benchmarks/engine.py --table                  the table of what has been measured

Every figure is a ratio against a rival measured in the same run, by turns. Each measurement is a process of its own and
is kept once done, in ``benchmarks/results/engine.json``, so that the same command resumes where it was stopped. Ratios
are medians over turns. Wall time is what counts; processor time, beside it, is steadier where others use the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import cocktailsdk
from cocktailsdk.io.atomic import write_json

RESULTS = Path(__file__).resolve().parent / "results" / "engine.json"

STEPS = {
    f"step {model} {recipe}": ("step_times", {"name": model, "recipe": recipe})
    for model in ("resnet18", "vit")
    for recipe in ("paper", "paper-finishing")
}
MEMORY = {
    f"memory {model} paper-finishing": ("step_memory", {"name": model, "recipe": "paper-finishing"})
    for model in ("resnet18", "vit", "vit_small")
}
GPU = {
    f"gpu {key}": (work, {**arguments, "device": "cuda", **({"turns": 20} if work == "step_times" else {})})
    for key, (work, arguments) in (STEPS | MEMORY).items()
} | {"gpu umg resnet50": ("against", {"size": "resnet50", "dtype": "float32", "repeats": 5, "device": "cuda"})}
UMG = {
    "umg resnet50 float32": ("against", {"size": "resnet50", "dtype": "float32", "repeats": 5}),
    "umg 1e8 float32": ("against", {"size": "1e8", "dtype": "float32", "repeats": 1}),
    "umg 1e8 bfloat16": ("against", {"size": "1e8", "dtype": "bfloat16", "repeats": 1}),
    **{
        f"umg memory {size} {dtype} {who}": ("memory", {"size": size, "dtype": dtype, "who": who})
        for size, dtype in (("resnet50", "float32"), ("1e8", "bfloat16"))
        for who in ("ours", "ours-unstructured", "usual")
    },
}
GROWTH = {
    **{
        f"growth weights {size}": ("memory", {"size": size, "dtype": "bfloat16", "who": "ours"})
        for size in ("1e6", "4e6", "1.6e7", "6.4e7", "2.56e8", "1e9")
    },
    "growth patterns": ("pattern_costs", {"size": "2e6"}),
    "growth levels": ("level_costs", {"size": "4e6", "counts": [1, 2, 5, 10, 20]}),
    "growth rounds": ("round_costs", {"counts": [1, 2, 5, 10, 20]}),
    "growth subnets": ("subnet_costs", {"counts": [1, 2, 4, 8, 16, 24]}),
}
PARTS = {"step": STEPS, "memory": MEMORY, "umg": UMG, "growth": GROWTH, "gpu": GPU}
MODULES = ("engine_umg", "engine_steps", "engine_growth")

LIMITS = {"paper": 1.22, "paper-finishing": 1.06, "copies": 1.0, "all": 8.0, "unstructured": 15.0, "extra": 0.2}


def read() -> dict[str, Any]:
    """What has been measured, by name."""
    return json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}


def measure(key: str, work: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """One measurement in a process of its own."""
    program = (
        "import importlib, json, sys\n"
        f"for name in {MODULES!r}:\n"
        "    module = importlib.import_module(name)\n"
        "    if hasattr(module, sys.argv[1]):\n"
        "        break\n"
        "print('RESULT', json.dumps(getattr(module, sys.argv[1])(**json.loads(sys.argv[2]))))\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    command = [sys.executable, "-c", program, work, json.dumps(arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    found = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not found:
        raise SystemExit(f"measuring {key!r} failed with exit code {done.returncode}:\n{done.stderr[-3000:]}")
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else -1.0
    return {**json.loads(found[-1][7:]), "environment": {**environment_of(), "load": round(load, 1)}}


def environment_of() -> dict[str, Any]:
    """Machine, versions and command."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return {
        "command": " ".join(["python", "benchmarks/engine.py", *sys.argv[1:]]),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": device,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cocktailsdk": cocktailsdk.__version__,
        "date": datetime.now(UTC).date().isoformat(),
    }


def ratio(rows: list[dict[str, float]], a: str, b: str) -> float:
    """The median over turns of a's cost by b's."""
    return median(row[a] / row[b] for row in rows)


def pooled(rows: list[dict[str, float]], suffix: str = "") -> float:
    """Co-training's time by dense training's: the median over turns of as many steps of every kind."""
    whole: list[float] = []
    ours = dense = steps = 0.0
    for row in rows:
        ours, dense, steps = ours + row[f"ours{suffix}"], dense + row[f"dense{suffix}"], steps + row["steps"]
        if steps >= 6:  # dense, unstructured, dense, N:M, dense, channel
            whole.append(ours / dense)
            ours = dense = steps = 0.0
    return median(whole)


def lines(results: dict[str, Any]) -> list[tuple[str, str, str, bool]]:
    """What was measured, in words: what, the figure, the limit, and whether it holds."""
    out: list[tuple[str, str, str, bool]] = []
    for key, r in results.items():
        work = next((entry[0] for part in PARTS.values() for name, entry in part.items() if name == key), "")
        if r.get("skipped"):
            out.append((key, f"skipped: {r['skipped']}", "", True))
        elif work == "step_times":
            time, limit = pooled(r["rows"]), LIMITS[r["recipe"]]
            of_processor = pooled(r["rows"], "_processor")
            out.append(
                (key, f"{time:.3f} x dense ({of_processor:.3f} in processor time)", f"<= {limit}", time <= limit)
            )
        elif work == "step_memory":
            limit = LIMITS["copies"]
            out.append(
                (key, f"{r['copies']:.2f} copies of the prunable weights", f"<= {limit}", r["copies"] < limit + 0.05)
            )
        elif work == "against":
            for what, suffix in (("all", ""), ("unstructured", "_unstructured")):
                found = ratio(r["rows"], f"usual{suffix}", f"ours{suffix}")
                own = median(row[f"ours{suffix}"] for row in r["rows"])
                text = f"{found:.1f} x faster than cat + topk ({own:.2f} s)"
                if suffix:
                    text += f"; {ratio(r['rows'], 'kthvalue_unstructured', 'ours_unstructured'):.1f} x than kthvalue"
                out.append((f"{key}, {what}", text, f">= {LIMITS[what]:.0f}", found >= LIMITS[what]))
        elif work == "memory":
            extra = r["extra"] * r["weight_bytes"]
            text = f"{r['extra']:.3f} x the weights' bytes ({extra / 1e6:.1f} MB), "
            text += f"peak {r['peak_rss'] / 2**30:.2f} GiB, {r['seconds']:.2f} s"
            mine = "usual" not in key and r["weight_bytes"] > 50e6  # some ten MB it takes in any case
            out.append((key, text, f"<= {LIMITS['extra']}" if mine else "", not mine or r["extra"] <= LIMITS["extra"]))
        elif "exponents" in r:
            for what, power in r["exponents"].items():
                out.append((f"{key}, {what}", f"grows with power {power:.2f}", "<= 1", power <= 1.1))
    weights = {k: r for k, r in results.items() if k.startswith("growth weights")}
    if len(weights) > 1:
        from engine_umg import exponent

        rows = list(weights.values())
        for what, costs in {
            "seconds": [r["seconds"] for r in rows],
            "bytes besides masks": [r["extra"] * r["weight_bytes"] for r in rows],
        }.items():
            power = exponent([r["weights"] for r in rows], costs)
            out.append((f"growth weights, {what}", f"grows with power {power:.2f}", "<= 1", power <= 1.1))
    return out


def table(results: dict[str, Any], console: Console) -> None:
    """Print what was measured."""
    shown = Table("what", "measured", "limit", box=None)
    for what, figure, limit, holds in lines(results):
        shown.add_row(what, figure if holds else f"[bold red]{figure}[/]", limit)
    console.print(shown)


def main() -> int:
    """Run as a script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to measure")
    parser.add_argument("--only", default="", help="only measurements whose name contains this")
    parser.add_argument("--again", action="store_true", help="also what has been measured")
    parser.add_argument("--table", action="store_true", help="only the table")
    options = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 140)
    chosen = {k: v for part in options.parts for k, v in PARTS[part].items() if options.only in k}
    for key, (work, arguments) in {} if options.table else chosen.items():
        results = read()
        if key in results and not results[key].get("skipped") and not options.again:
            continue
        if arguments.get("device") == "cuda" and not torch.cuda.is_available():
            results[key] = {"skipped": "no CUDA device"}
        else:
            console.print(f"measuring {key} …")
            measured = measure(key, work, arguments)
            results = {**read(), key: measured}
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        write_json(RESULTS, results)
    table(read(), console)
    return 0


if __name__ == "__main__":
    sys.exit(main())
