"""Results of all networks, for people and as JSON."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from statistics import mean
from typing import Any

from rich.table import Table

from cocktailsdk.net.costs import SubnetReport
from cocktailsdk.report.numbers import count_text, flops_text

TITLES = {"bbox": "box", "segm": "mask"}


def metrics_table(reports: Iterable[SubnetReport], metrics: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Table:
    """Box AP and mask AP of every network that was measured, beside its size."""
    kinds = list(next(iter(metrics.values()), {}))
    table = Table("network", "sparsity", "parameters", "FLOPs")
    for kind in kinds:
        for name in ("AP", "AP50"):
            table.add_column(f"{TITLES.get(kind, kind)} {name}", justify="right")
    rows = [r for r in reports if r.name in metrics]
    whole = next((r.flops for r in rows if r.name == "dense"), None)
    for row in rows:
        found = [f"{metrics[row.name][kind][name]:.1f}" for kind in kinds for name in ("AP", "AP50")]
        flops = flops_text(row.flops) if whole is None else f"{100 * row.flops / whole:.0f} %"
        table.add_row(row.name, f"{row.sparsity_exact:.3f}", count_text(row.params), flops, *found)
    return table


def summary(metrics: Mapping[str, Mapping[str, Mapping[str, float]]]) -> list[str]:
    """For each kind the dense AP, the mean of the channel networks, and the gap between them."""
    lines = []
    for kind in next(iter(metrics.values()), {}):
        channel = [m[kind]["AP"] for name, m in metrics.items() if name.startswith("channel@")]
        if channel and "dense" in metrics:
            dense, found = metrics["dense"][kind]["AP"], mean(channel)
            lines.append(
                f"{TITLES.get(kind, kind)} AP: dense {dense:.1f}, mean of {len(channel)} channel networks {found:.1f}, "
                f"gap {dense - found:.1f}"
            )
    return lines


def jsonable(value: Any) -> Any:
    """Without numbers that JSON has not."""
    if isinstance(value, Mapping):
        return {k: jsonable(v) for k, v in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
