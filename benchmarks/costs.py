"""What ResNet-50's networks cost for one image: the paper's Tables 9 and 10.

    python benchmarks/costs.py             what is missing, then the table
    python benchmarks/costs.py --table     the table of what has been measured

Multiply-adds are counted, and memory is the most that weights, input and activations take at once in float32; neither
depends on the machine or its load. Rows are in ``benchmarks/results/costs.json``, where each is kept as it is made.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import cocktailsdk as cocktail
from cocktailsdk.choosing.memory import peak_bytes
from cocktailsdk.io.atomic import write_json
from cocktailsdk.models import build_model

RESULTS = Path(__file__).resolve().parent / "results" / "costs.json"
MODEL, IMAGE = "resnet50", (1, 3, 224, 224)
NETWORKS = ("dense", "channel@0.1", "channel@0.271", "channel@0.469", "channel@0.613", "unstructured@0.488", "2:4")


def read() -> dict[str, Any]:
    """What there is, by network."""
    if not RESULTS.is_file():
        return {"command": "python benchmarks/costs.py", "model": MODEL, "torch": torch.__version__, "costs": {}}
    found: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8"))
    return found


def measure(found: dict[str, Any]) -> None:
    """Counts what is missing."""
    x = torch.zeros(IMAGE)
    patterns = ["unstructured@0.488", "2:4", cocktail.Channel(round_to=1)]
    net = cocktail.sparsify(build_model(MODEL), patterns, example_inputs=(x,))
    net.eval()
    counted = {report.name: report for report in net.subnets()}
    for name in NETWORKS:
        if name in found["costs"]:
            continue
        model = net.slim(name).eval() if name.startswith("channel@") else net.model
        report = counted[name]
        found["costs"][name] = {
            "macs": report.flops // 2,
            "nonzero_macs": report.nonzero_macs,
            "parameters": report.params,
            "peak_bytes": peak_bytes(model, (x,), {}),
        }
        write_json(RESULTS, found)


def table(found: dict[str, Any]) -> Table:
    """A row for each network."""
    made = Table("network", "multiply-adds", "of them by weights that are not zero", "peak memory")
    for name, row in found["costs"].items():
        made.add_row(name, f"{row['macs']:,}", f"{row['nonzero_macs']:,}", f"{row['peak_bytes']:,}")
    return made


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="measure nothing")
    asked = parser.parse_args()
    found = read()
    if not asked.table:
        measure(found)
    Console().print(table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
