"""The table of docs/exporting.md: what benchmarks/deploy.py measured."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "deploy.json"
TITLES = {
    "torch eager": "torch eager",
    "torch.compile": "torch.compile",
    "onnxruntime": "onnxruntime",
    "openvino": "OpenVINO",
}


def deploy_block() -> str:
    """Every network's speed beside the dense one's in each runtime, and whether the goal is met."""
    if not RESULTS.is_file():
        return ""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from deploy_rows import GOAL, RUNTIMES_WANTED, WANTED, goal, in_order

    data = json.loads(RESULTS.read_text(encoding="utf-8"))
    rows: list[dict[str, Any]] = data["rows"]
    runtimes = [r for r in TITLES if any(row["runtime"] == r for row in rows)]
    out = [
        f"| {data['model']} | FLOPs | {' | '.join(TITLES[r] for r in runtimes)} |",
        "| --- | --: |" + " --: |" * len(runtimes),
    ]
    for name, mine in in_order(rows).items():
        flops = next(iter(mine.values()))["flops"]
        cells = [f"{mine[r]['ratio']:.2f}" if r in mine else "" for r in runtimes]
        out.append(f"| `{name}` | {100 * flops:.0f} % | {' | '.join(cells)} |")
    met, found = goal(rows)
    told = ", ".join(f"{ratio:.2f} in {TITLES[r]}" for r, ratio in found.items())
    verdict = "met" if met >= RUNTIMES_WANTED else "missed"
    out += [
        "",
        f"Wanted: `{GOAL}` at least {WANTED:g} times as fast in {RUNTIMES_WANTED} runtimes; it is {told}: {verdict}.",
        "",
        *_machine(rows),
    ]
    return "\n".join(out) + "\n"


def _machine(rows: list[dict[str, Any]]) -> list[str]:
    seen = [row["environment"] for row in rows]
    loads = [e["load"] for e in seen]
    first, row = seen[0], rows[0]
    versions = ", ".join(f"{k} {first[k]}" for k in ("torch", "onnxruntime", "openvino", "timm", "cocktailsdk"))
    turns = " or ".join(str(n) for n in sorted({r["turns"] for r in rows}))
    out = [
        f"`python benchmarks/deploy.py`: one image of 224 x 224, float32, medians of {turns} turns, threads: "
        f"{row['threads']}, {first['machine']} with {first['cores']} cores; {versions}."
    ]
    if max(loads) > 2.5:
        out.append(f"Others used the machine meanwhile (load {min(loads)} to {max(loads)}).")
    return out
