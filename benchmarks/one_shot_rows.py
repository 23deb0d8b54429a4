"""Rows of the one-shot comparison, and the tables made of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from one_shot_pieces import TASKS, USUAL
from one_shot_tasks import Task
from result_rows import Row
from trained_rows import markdown

RESULTS = Path(__file__).resolve().parent / "results" / "one_shot.json"

MARGIN = 1.02
"""How much worse than the plain version of a method ours may be."""


@dataclass(frozen=True)
class Target:
    """What ours is to reach on SmolLM2 with the usual calibration.

    Attributes:
        subnet: The subnetwork.
        perplexity: At most.
        reconstructed: Whether it is of reconstructed networks, or of those by a score alone.
    """

    subnet: str
    perplexity: float
    reconstructed: bool = False


TARGETS = (
    Target("unstructured@0.5", 75.0),
    Target("unstructured@0.5", 64.0, reconstructed=True),
    Target("2:4", 140.0),
    Target("2:4", 79.0, reconstructed=True),
    Target("mlp@0.1", 46.0),
    Target("mlp@0.2", 53.0),
    Target("layers@0.1", 56.0),
)

CPU_MINUTES = 10.0
"""In which twelve subnetworks of SmolLM2 are to be scored."""


def text(value: float) -> str:
    """A metric, in about four digits."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}"


def methods_table(rows: Iterable[Row], task: Task) -> str:
    """A line for each method and size of calibration, a column for each subnetwork."""
    found: dict[tuple[str, str], dict[str, float]] = {}
    seconds: dict[tuple[str, str], float] = {}
    for row in (r for r in rows if r["task"] == task.name):
        key = (row["method"], row["size"])
        found.setdefault(key, {}).update(row["values"])
        seconds[key] = seconds.get(key, 0.0) + row["cpu_seconds"]
    names = sorted({n for values in found.values() for n in values}, key=_order)
    lines = [
        [method, size, *(text(values[n]) if n in values else "" for n in names), f"{seconds[method, size]:.0f}"]
        for (method, size), values in sorted(found.items(), key=lambda item: _method_order(item[0]))
    ]
    return markdown(["method", "calibration", *names, "CPU s"], lines)


def _order(subnet: str) -> tuple[int, str]:
    kinds = ("dense", "unstructured", "n:m", "channel", "heads", "mlp", "layers", "depth")
    kind = "n:m" if ":" in subnet else subnet.partition("@")[0]
    return (kinds.index(kind) if kind in kinds else len(kinds), subnet)


def _method_order(key: tuple[str, str]) -> tuple[int, bool, int, str]:
    method, size = key
    rows, _, length = size.partition("x")
    kind = next(i for i, start in enumerate(("dense", "reference", "magnitude", "")) if method.startswith(start))
    return (kind, "reconstructed" in method, int(rows or 0) * int(length or 1), method)


def best_of(rows: Iterable[Row], subnet: str, size: str, *, reconstructed: bool, reference: bool) -> Row | None:
    """The row of SmolLM2 with the least perplexity of a subnetwork."""
    mine = [
        r
        for r in rows
        if (r["task"], r["size"], r["reconstructed"]) == ("smollm2", size, reconstructed)
        and r["method"].startswith("reference") == reference
        and subnet in r["values"]
    ]
    return min(mine, key=lambda r: r["values"][subnet], default=None)


def target_table(rows: Sequence[Row]) -> str:
    """What ours is to reach on SmolLM2, what it reaches, and the plain version beside it, for each calibration size."""
    lines = []
    for size in map(str, TASKS["smollm2"].sizes):
        for target in TARGETS:
            subnet, usual = target.subnet, size == str(USUAL)
            ours, plain = (
                best_of(rows, subnet, size, reconstructed=target.reconstructed, reference=reference)
                for reference in (False, True)
            )
            if ours is None:
                continue
            value = ours["values"][subnet]
            reached = (not usual or value <= target.perplexity) and not _behind(value, plain, subnet)
            lines.append(
                [
                    f"{subnet}{', reconstructed' if target.reconstructed else ''}",
                    size,
                    text(target.perplexity) if usual else "",
                    text(value),
                    ours["method"],
                    f"{text(plain['values'][subnet])} ({plain['method'].partition(' ')[2]})" if plain else "",
                    "yes" if reached else "no",
                ]
            )
    if twelve := [r for r in rows if r["task"] == "smollm2" and len(r["values"]) == 12]:
        minutes = min(r["cpu_seconds"] for r in twelve) / 60
        reached = "yes" if minutes <= CPU_MINUTES else "no"
        title = "12 subnetworks scored, CPU minutes"
        lines.append([title, twelve[0]["size"], f"{CPU_MINUTES:g}", f"{minutes:.1f}", twelve[0]["method"], "", reached])
    return markdown(["target", "calibration", "at most", "ours", "by", "plain version", "reached"], lines)


def _behind(value: float, plain: Mapping[str, Mapping[str, float]] | None, subnet: str) -> bool:
    return plain is not None and value > MARGIN * plain["values"][subnet]


def worse_when_reconstructed(rows: Sequence[Row]) -> list[str]:
    """Which networks reconstruction made worse, in words; there are to be none."""
    scored = {(r["task"], r["method"], r["size"], n): v for r in rows for n, v in r["values"].items()}
    out = []
    for (task, method, size, name), value in scored.items():
        before = scored.get((task, method.removesuffix(", reconstructed"), size, name))
        if not method.endswith(", reconstructed") or before is None:
            continue
        if value > before if TASKS[task].lower_is_better else value < before:
            out.append(f"{task} {name} by {method}: {text(before)} before, {text(value)} after")
    return out


def tables(rows: Sequence[Row]) -> str:
    """All tables, as Markdown."""
    parts = []
    for task in TASKS.values():
        if any(r["task"] == task.name for r in rows):
            parts += [f"**{task.title}**: {task.metric}", methods_table(rows, task)]
    parts += [target_table(rows)]
    if worse := worse_when_reconstructed(rows):
        parts += ["Reconstruction made these worse:", "\n".join(f"- {line}" for line in worse)]
    return "\n\n".join(parts)
