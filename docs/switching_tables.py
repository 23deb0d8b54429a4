"""The tables of docs/switching.md: what benchmarks/switch.py measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results" / "switch.json"
WANTED, WANTED_OF_VIEWS = 50, 1000


def switching_block() -> str:
    """Time and memory of each model."""
    rows = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    if not rows:
        return "Not measured yet: `python benchmarks/switch.py`.\n"
    return "\n".join(line for row in rows.values() for line in _model(row)) + "\n"


def _model(row: dict[str, Any]) -> list[str]:
    out = [
        f"**{row['title']}**, random weights (`{row['command']}`; {row['machine']}, torch {row['torch']}): medians of "
        f"{row['repeats']} repeats in turn, in milliseconds of that thread (by the clock where it waits for the disk), "
        "and how many times faster than loading the subnetwork's own file from the system's cache. Wanted: "
        f"{WANTED} times, and {WANTED_OF_VIEWS} for views.",
        "",
        "| network | load | load, cold | switch | | preload | switch, preloaded | | view | |",
        "| --- | --: | --: | --: | --: | --: | --: | --: | --: | --: |",
    ]
    for name, by in row["subnets"].items():
        cells = [_ms(by["load"]), _ms(by["load, cold, clock"]), _ms(by["switch"]), _times(by, "switch")]
        cells += [_ms(by["preload"]), _ms(by["preloaded"]), _times(by, "preloaded")]
        cells += [_ms(by["view"]), _times(by, "view")] if "view" in by else ["", ""]
        out.append(f"| `{name}` | " + " | ".join(cells) + " |")
    memory, one = row["memory"], row["memory"]["one network"]
    shares = {what: held / one for what, held in memory.items() if what != "one network"}
    out += [
        "",
        f"Memory, in networks of {one / 1e6:.0f} MB (all {row['networks']}): {shares['at rest, used']:.2f} at rest, "
        f"{shares['active']:.2f} with one active, as much with one preloaded and active "
        f"({shares['preloaded and active']:.2f}). Views of {len(row['copied'])} widths: "
        f"{shares['views, shared']:.2f} shared, {shares['views, copied']:.2f} copied for all together"
        f"{_named(row['copied tensors'])}. Made in {row['views made in s']:.0f} s, most of it for the checks.",
        "",
        "| width | parameters | copied | forward, view | forward, slim | difference |",
        "| --- | --: | --: | --: | --: | --: |",
    ]
    for name, held in row["slim"].items():
        found = row["forward"].get(name)
        cells = [f"{held / 1e6:.1f} MB", f"{row['copied'][name] / 1e6:.2f} MB"]
        cells += [_ms(found["view"]), _ms(found["slim"]), f"{found['difference']:.0e}"] if found else ["", "", ""]
        out.append(f"| `{name}` | " + " | ".join(cells) + " |")
    return [*out, ""]


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g}" if seconds >= 1e-5 else f"{1e3 * seconds:.1g}"


def _times(by: dict[str, float], what: str) -> str:
    ratio = by["load"] / by[what]
    return f"{ratio:.1f} x" if ratio < 10 else f"{ratio:,.0f} x"


def _named(tensors: list[str]) -> str:
    kinds = sorted({".".join(p for p in t.split(".") if not p.isdecimal()) for t in tensors})
    return f" (besides statistics, `{'`, `'.join(kinds)}`)" if kinds else " (statistics alone)"
