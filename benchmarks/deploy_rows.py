"""Rows of benchmarks/deploy.py, and what they come to; without torch, for the documentation's tables."""

from __future__ import annotations

from typing import Any

GOAL, WANTED, RUNTIMES_WANTED = "channel@0.613", 4.0, 2


def goal(rows: list[dict[str, Any]]) -> tuple[int, dict[str, float]]:
    """In how many runtimes the channel network of 16 % of the FLOPs is fast enough, and its ratios."""
    found = {r["runtime"]: r["ratio"] for r in rows if r["network"] == GOAL}
    return sum(ratio >= WANTED for ratio in found.values()), found


def in_order(rows: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """Rows by network and runtime; by pattern and by FLOPs and name within each."""
    patterns = list(dict.fromkeys(("unstructured", "n:m", "channel", *(r["pattern"] for r in rows))))
    ordered = sorted(rows, key=lambda r: (patterns.index(r["pattern"]), -r["flops"], r["network"]))
    out: dict[str, dict[str, dict[str, Any]]] = {}
    for row in ordered:
        out.setdefault(row["network"], {})[row["runtime"]] = row
    return out
