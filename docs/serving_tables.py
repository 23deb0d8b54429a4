"""The tables of docs/serving.md: what benchmarks/serving.py found."""

from __future__ import annotations

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "serving.json"

BUSY = (
    "The machine was busy with other work, which both runs shared it with: everything takes longer, and less is held, "
    "than on one that is not."
)


def serving_block() -> str:
    """The networks, then both runs."""
    if not RESULTS.is_file():
        return "Not measured yet.\n"
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from serving import lines

    found = json.loads(RESULTS.read_text(encoding="utf-8"))
    images, (head, *rows) = found["images in a request"], lines(found)
    rates = [rate for rate, _ in found["steps"]]
    dense = found["held"]["dense"]
    narrowest = found["ladder"][-1]["name"]
    out = [
        f"`{found['command']}` on {found['machine']} (torch {found['torch']}; load of the machine before: "
        f"{found['load before']}). With dense alone the service holds {dense:.0f} requests a second of {images} images "
        f"each, with `{narrowest}` alone {found['held'][narrowest]:.0f}; the rate goes from {min(rates):.0f} to "
        f"{max(rates):.0f} and back, {max(rates) / dense:.1f} times what dense holds. The goal is "
        f"{found['goal_ms']:.0f} ms, where one client alone waits "
        f"{found['dense alone, one client, ms']:.0f} ms for dense.",
        *(["", BUSY] if found["load before"] > 2 else []),
        "",
        "| " + " | ".join(head) + " |",
        "| --- |" + " --: |" * (len(head) - 1),
        *("| " + " | ".join(row) + " |" for row in rows),
        "",
        "![Offered rate, latency, networks that answered and accuracy over time](assets/serving.png)",
        "",
        f"| network served | ms for {images} images, at the start | accuracy |",
        "| --- | --: | --: |",
        *(f"| `{n['name']}` | {n['ms']:.2f} | {100 * n['accuracy']:.2f} % |" for n in found["ladder"]),
    ]
    return "\n".join(out) + "\n"
