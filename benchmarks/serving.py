"""A latency goal under load that rises beyond what dense holds, and falls again: dense alone, and with switching.

    python benchmarks/serving.py                    all of it, about ten minutes on two cores
    python benchmarks/serving.py --show             print what is in benchmarks/results/serving.json

Trains the bundle of ``examples/serving`` unless it is in runs/serving (training resumes): a ResNet-8 four times as wide
as the digits preset's, dense and at five widths. The preset's own network takes less time than the web server around
it, which no choice of a network could make faster; for the same reason a request carries 64 images.

Starts ``examples/serving/serve.py`` on a free port of this machine, and measures what it holds with the dense network
alone, and with the narrowest alone: the requests a second that are answered when there is always one more (closed
loop). Then requests of real test images are sent at random times, at rates that go up in steps to more than twice what
dense holds and down again, each when it is due, whether or not earlier ones were answered (open loop): once to the
dense network alone, once with switching, at the same times. Latency counts from when a request was due. The goal is
kept in a window of two seconds if 95 % of its requests were answered in time; a failed request is not in time.

The generator, the web server and the network share this machine's cores. The results are in
``benchmarks/results/serving.json``, the picture in ``docs/assets/serving.png``. The two runs are compared with each
other, so they are not taken up again once interrupted: the command runs both anew.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import torch
from serving_figure import write_figure
from serving_load import Batch, capacity, offer, schedule, windows

from cocktailsdk.io.atomic import write_json
from cocktailsdk.presets import get_preset

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results" / "serving.json"
FIGURE = ROOT / "docs" / "assets" / "serving.png"
EXAMPLE = ROOT / "examples" / "serving"
MODEL = "cocktail_serving.digits:model"

IMAGES = 64
"""In a request."""
SHAPE = (0.4, 0.7, 1.2, 1.8, 2.5, 1.8, 1.2, 0.7, 0.4)
"""Rates, as multiples of what dense holds."""
ROOM = 0.7
"""Share of what the narrowest holds that the highest rate has at most: beyond it no switching could help."""
GOAL = 8
"""The goal is so many times the latency of dense when nothing else goes on."""
WINDOW = 2.0
CLIENTS = 8
"""That ask as fast as they are answered, to find what is held."""


def main() -> int:
    """Run as a script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/serving"), help="where the bundle is, or is trained")
    parser.add_argument("--step", type=float, default=14.0, help="seconds of each rate")
    parser.add_argument("--calibration", type=float, default=8.0, help="seconds of each measurement of what is held")
    parser.add_argument("--seed", type=int, default=0, help="of the times at which requests are due")
    parser.add_argument("--show", action="store_true", help="measure nothing")
    asked = parser.parse_args()
    if not asked.show:
        if not (asked.run / "bundle").is_dir():
            subprocess.run([sys.executable, str(EXAMPLE / "train.py"), str(asked.run)], check=True)
        found = measured(asked.run / "bundle", asked)
        write_json(RESULTS, found)
        write_figure(found, FIGURE)
    show(json.loads(RESULTS.read_text(encoding="utf-8")))
    return 0


def measured(bundle: Path, asked: argparse.Namespace) -> dict[str, Any]:
    """Both runs."""
    batches, load = requests(), os.getloadavg()[0]
    held: dict[str, float] = {}
    with contextlib.ExitStack() as stack:
        urls = {"dense": stack.enter_context(service(bundle, "dense"))}
        latency = asyncio.run(capacity(f"{urls['dense']}/predict", batches, asked.calibration, 1))[1]
        held["dense"] = asyncio.run(capacity(f"{urls['dense']}/predict", batches, asked.calibration, CLIENTS))[0]
        goal = GOAL * latency
        urls["switching"] = stack.enter_context(service(bundle, goal_ms=1e3 * goal))
        ladder = httpx.get(f"{urls['switching']}/history", trust_env=False).json()["networks"]
        narrowest = ladder[-1]["name"]
        with service(bundle, narrowest) as url:
            held[narrowest] = asyncio.run(capacity(f"{url}/predict", batches, asked.calibration, CLIENTS))[0]
        most = min(max(SHAPE), ROOM * held[narrowest] / held["dense"])
        steps = [(min(k, most) * held["dense"], asked.step) for k in SHAPE]
        due = schedule(steps, asked.seed)
        print(
            f"dense holds {held['dense']:.0f}/s, {narrowest} {held[narrowest]:.0f}/s; goal {1e3 * goal:.0f} ms",
            flush=True,
        )
        runs = {}
        for name, url in urls.items():
            sent = asyncio.run(offer(f"{url}/predict", due, batches))
            text = httpx.get(f"{url}/metrics", trust_env=False).text
            switches = sum(float(n) for n in re.findall(r"^cocktail_switches_total\{.*\} (\S+)", text, re.M))
            runs[name] = {"windows": windows(sent, WINDOW, goal), "switches": int(switches)}
            print(f"{name}: {len(sent)} requests, {sum(s.status != 200 for s in sent)} failed", flush=True)
    return {
        "command": "python benchmarks/serving.py",
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "load before": round(load, 2),
        "torch": str(torch.__version__),
        "images in a request": IMAGES,
        "ladder": [{**n, "ms": round(IMAGES * n["ms"], 3)} for n in ladder],
        "held": {name: round(rate, 2) for name, rate in held.items()},
        "dense alone, one client, ms": round(1e3 * latency, 2),
        "goal_ms": round(1e3 * goal, 2),
        "window_s": WINDOW,
        "steps": [[round(rate, 3), seconds] for rate, seconds in steps],
        "seed": asked.seed,
        "runs": runs,
    }


def requests() -> list[Batch]:
    """The test images, as requests."""
    images, labels = (torch.cat(parts) for parts in zip(*get_preset("digits").loaders().test, strict=True))
    return [
        Batch.of(images[i : i + IMAGES], labels[i : i + IMAGES]) for i in range(0, len(labels) - IMAGES + 1, IMAGES)
    ]


@contextlib.contextmanager
def service(bundle: Path, *only: str, goal_ms: float = 1e3) -> Iterator[str]:
    """The example's service in a process of its own; its address."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [sys.executable, str(EXAMPLE / "serve.py"), str(bundle), "--model", MODEL, "--port", str(port)]
    command += ["--goal-ms", str(goal_ms), "--typical-batch", str(IMAGES)]
    command += [part for name in only for part in ("--only", name)]
    # A session of its own: Ctrl-C here ends the run, which then ends the service in order.
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True)
    url, began = f"http://127.0.0.1:{port}", time.monotonic()
    try:
        while True:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{url}/health/ready", trust_env=False).status_code == 200:
                    break
            if process.poll() is not None or time.monotonic() - began > 300:
                raise RuntimeError(f"the service did not start: {' '.join(command)}")
            time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        try:
            process.wait(40)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def totals(run: Mapping[str, Any]) -> dict[str, float]:
    """A run in numbers."""
    rows: Sequence[Mapping[str, Any]] = run["windows"]
    return {
        "windows": len(rows),
        "kept": sum(r["kept"] for r in rows),
        "requests": sum(r["requests"] for r in rows),
        "failed": sum(r["failed"] for r in rows),
        "late": sum(r["requests"] - r["failed"] - r["within"] for r in rows),
        "accuracy": sum(r["right"] for r in rows) / max(1, sum(r["examples"] for r in rows)),
        "switches": run["switches"],
    }


def lines(found: Mapping[str, Any]) -> list[list[str]]:
    """The runs as rows of a table, a head first."""
    out = [["", "dense alone", "switching", "wanted"]]
    dense, ours = (totals(found["runs"][name]) for name in ("dense", "switching"))

    def row(what: str, text: Any, wanted: str = "") -> None:
        out.append([what, text(dense), text(ours), wanted])

    row("windows in which the goal was kept", lambda t: f"{100 * t['kept'] / t['windows']:.1f} %", "95 %")
    missed = [not r["kept"] for r in found["runs"]["dense"]["windows"]]
    of = [r["kept"] for r, m in zip(found["runs"]["switching"]["windows"], missed, strict=True) if m]
    out.append(["of those in which dense missed it", "0 %", f"{100 * sum(of) / max(1, len(of)):.1f} %", ""])
    row("requests", lambda t: f"{t['requests']:,}")
    row("of these failed", lambda t: f"{t['failed']:,}", "0")
    row("answered late", lambda t: f"{t['late']:,}")
    row("accuracy of what was answered", lambda t: f"{100 * t['accuracy']:.2f} %")
    row("switches", lambda t: f"{t['switches']}")
    return out


def show(found: Mapping[str, Any]) -> None:
    """Print what was found."""
    from rich.console import Console
    from rich.table import Table

    head, *rows = lines(found)
    table = Table(title=f"goal {found['goal_ms']:.0f} ms; {found['machine']}; {found['command']}")
    for column in head:
        table.add_column(column, justify="right" if column else "left")
    for row in rows:
        table.add_row(*row)
    Console(width=120).print(table)


if __name__ == "__main__":
    sys.exit(main())
