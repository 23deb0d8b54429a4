"""What it takes to go from one network to another, against loading that network's own checkpoint.

    python benchmarks/switch.py                           ResNet-50 and ViT-B/16, one process each; see --model
    python benchmarks/switch.py --model resnet50 --again  measure a model anew

For each pattern, on random weights of timm's models and one image:

- *load*: ``model.load_state_dict(load_file(path))`` of a safetensors file of that subnetwork alone, as large as the
  dense network's (of the slim model, where channels go), read before and so in the system's cache of files; *load,
  cold*: after the system was asked to forget the file;
- *switch*: ``net.switch(name)`` from the dense network, memory beyond the dense network's own given back in between;
- *preloaded*: the same after ``net.preload(name)``;
- *view*: ``views[name]`` of ``net.views()``.

All are repeated in turn, on one thread, and medians compared: of the time in which that thread ran (and the system for
it), since on a machine that others use too, the clock counts them; the clock's medians are in the results besides, and
are what is said of *cold*, which waits for the disk. Memory is counted in bytes of tensors' storages that the net can
reach. Results are in ``benchmarks/results/switch.json``, a row for each model; those that are there are kept.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import timm
import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import cocktailsdk as cocktail
from cocktailsdk.io.atomic import write_json

RESULTS = Path(__file__).resolve().parent / "results" / "switch.json"
MODELS = {"resnet50": "ResNet-50", "vit_base_patch16_224": "ViT-B/16"}
WIDTHS = ("channel@0.1", "channel@0.271", "channel@0.469", "channel@0.613")
NAMES = ("unstructured@0.488", "unstructured@0.893", "2:4", "channel@0.271", "channel@0.613")


def storage_bytes(*roots: Any) -> int:
    """Bytes of all tensors' storages that objects hold, each counted once."""
    storages: dict[int, int] = {}
    seen: set[int] = set()
    todo = list(roots)
    while todo:
        value = todo.pop()
        if id(value) in seen or isinstance(value, str | bytes | int | float | type):
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            storages[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
            todo += [value.grad] if value.is_leaf else []
        elif isinstance(value, list | tuple | set | frozenset):
            todo += value
        else:  # what is worked out when it is asked for (packed masks) is held by attributes
            todo += value.values() if isinstance(value, dict) else []
            todo += vars(value).values() if hasattr(value, "__dict__") else []
    return sum(storages.values())


def main() -> int:
    """Run as a script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, help="one model; otherwise each in a process of its own")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--again", action="store_true", help="measure what is there already too")
    asked = parser.parse_args()
    rows = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    for name in [asked.model] if asked.model else list(MODELS):
        if name in rows and not asked.again:
            continue
        if asked.model:
            row = measured(name, asked.repeats)
            rows = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
            write_json(RESULTS, {**rows, name: row})
        else:
            command = [sys.executable, __file__, "--model", name, "--repeats", str(asked.repeats), "--again"]
            subprocess.run(command, check=True)
    show(json.loads(RESULTS.read_text(encoding="utf-8")))
    return 0


def measured(name: str, repeats: int) -> dict[str, Any]:
    """A model's row."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    other = copy.deepcopy(model)
    x = torch.randn(1, 3, 224, 224)
    net = cocktail.sparsify(model, example_inputs=(x,))
    print(f"{name}: coupled and masked", flush=True)
    for subnet in net.names[1:]:  # as a trained net has them
        net.statistics[subnet] = {
            n: b.clone() for n, b in model.named_buffers() if n.endswith(("running_mean", "running_var"))
        }
    dense = {n: t.clone() for n, t in model.state_dict().items()}
    one = sum(t.nbytes for t in dense.values())
    memory = {"one network": one, "at rest, new": storage_bytes(net)}
    began = time.perf_counter()
    views = net.views(WIDTHS)
    made_s = time.perf_counter() - began
    print(f"{name}: views made in {made_s:.0f} s", flush=True)
    memory |= {"views, shared": views.shared_bytes, "views, copied": views.copied_bytes}
    with tempfile.TemporaryDirectory() as folder:
        subnets = {n: Subnet(net, n, views, other, Path(folder)) for n in NAMES}
        times: dict[str, dict[str, list[float]]] = {n: {} for n in NAMES}
        memory["active"] = memory["preloaded and active"] = 0
        for _ in range(repeats):
            for n, subnet in subnets.items():
                for what, seconds, clock in subnet.once(memory):
                    times[n].setdefault(what, []).append(seconds)
                    times[n].setdefault(f"{what}, clock", []).append(clock)
    net.switch("dense")
    memory["at rest, used"] = storage_bytes(net)
    same = all(torch.equal(t, dense[n]) for n, t in model.state_dict().items())
    assert same, "the dense weights have changed"
    forwards = {n: forward_times(views[n], net.slim(n), x, repeats) for n in NAMES if n in views}
    return {
        "title": MODELS[name],
        "networks": len(net.names),
        "subnets": {n: {what: median(found) for what, found in by.items()} for n, by in times.items()},
        "memory": memory,
        "copied": {n: sum(by.values()) for n, by in views.copied.items()},
        "copied tensors": sorted({t for by in views.copied.values() for t in by if not is_statistic(t)}),
        "slim": {n: sum(p.numel() * p.element_size() for p in view.parameters()) for n, view in views.items()},
        "forward": forwards,
        "views made in s": made_s,
        "repeats": repeats,
        "command": f"python benchmarks/switch.py --repeats {repeats}",
        "machine": f"{platform.processor() or platform.machine()}, one thread",
        "torch": torch.__version__,
    }


def is_statistic(name: str) -> bool:
    """Whether a name is of a batch norm's statistics, which every network has of its own."""
    return name.endswith(("running_mean", "running_var", "num_batches_tracked"))


class Subnet:
    """A subnetwork and the file that it would otherwise be loaded from."""

    def __init__(
        self, net: cocktail.CocktailNet, name: str, views: Mapping[str, nn.Module], other: nn.Module, folder: Path
    ) -> None:
        self._net, self._name, self._views = net, name, views
        self._other = net.slim(name) if name in views else other
        with net.using(name):
            state = (self._other if name in views else net.model).state_dict()
            self._path = folder / f"{name.replace(':', '-')}.safetensors"
            save_file({n: t.contiguous() for n, t in state.items()}, self._path)
        self._load()

    def once(self, memory: dict[str, int]) -> list[tuple[str, float, float]]:
        """Each way once, in seconds of the thread and of the clock; memory is noted."""
        net, name = self._net, self._name
        gc.collect()
        out = [("load", *timed(self._load)), ("switch", *timed(lambda: net.switch(name)))]
        memory["active"] = max(memory["active"], storage_bytes(net))
        net.switch("dense")
        out.append(("preload", *timed(lambda: net.preload(name))))
        out.append(("preloaded", *timed(lambda: net.switch(name))))
        memory["preloaded and active"] = max(memory["preloaded and active"], storage_bytes(net))
        out.append(("back to dense", *timed(lambda: net.switch("dense"))))
        net.preload()
        if name in self._views:
            seconds, clock = timed(lambda: [self._views[name] for _ in range(1000)])
            out.append(("view", seconds / 1000, clock / 1000))
        self._forgotten()
        return [*out, ("load, cold", *timed(self._load))]

    def _load(self) -> None:
        self._other.load_state_dict(load_file(self._path))

    def _forgotten(self) -> None:
        """Have the system forget what it read of the file."""
        with open(self._path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def timed(run: Callable[[], object]) -> tuple[float, float]:
    """Seconds that a call takes, of this thread and of the clock."""
    began = time.thread_time(), time.perf_counter()
    run()
    return time.thread_time() - began[0], time.perf_counter() - began[1]


def forward_times(view: nn.Module, slim: nn.Module, x: Tensor, repeats: int) -> dict[str, float]:
    """Seconds of a forward pass on one image, of the view's and of the slim model's, and how far the outputs differ."""
    with torch.inference_mode():
        a, b = view(x), slim(x)
        pairs = [(timed(lambda: view(x))[0], timed(lambda: slim(x))[0]) for _ in range(repeats)]
    return {
        "view": median(p[0] for p in pairs),
        "slim": median(p[1] for p in pairs),
        "difference": float((a - b).norm() / b.norm()),
    }


def show(rows: Mapping[str, Any]) -> None:
    """A table for each model."""
    console = Console(width=130)
    for row in rows.values():
        table = Table(title=f"{row['title']}: milliseconds, and how many times faster than loading")
        for column in ("network", "load", "cold", "switch", "", "preloaded", "", "view", ""):
            table.add_column(column, justify="left" if column == "network" else "right")
        for n, by in row["subnets"].items():
            cells = [f"{1e3 * by['load']:.1f}", f"{1e3 * by['load, cold, clock']:.1f}"]
            for what in ("switch", "preloaded", "view"):
                cells += [f"{1e3 * by[what]:.4g}", f"{by['load'] / by[what]:.4g} x"] if what in by else ["", ""]
            table.add_row(n, *cells)
        console.print(table)
        one = row["memory"]["one network"]
        for what, held in row["memory"].items():
            console.print(f"{what}: {held / 1e6:.1f} MB, {held / one:.2f} networks")


if __name__ == "__main__":
    sys.exit(main())
