"""The Pareto charts: metric against what a network costs."""

from __future__ import annotations

import math
import os
import re
import shlex
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..utils.grouping import grouped
from ..utils.layer_names import few
from .chart import Chart, Mark, Series, Table
from .numbers import bytes_text, count_text, flops_text, percent_text
from .run import NetworkRow, RunReport

if TYPE_CHECKING:
    from ..choosing.profile import DeviceProfile

__all__ = ["command_for", "cost_charts", "front", "metric_text", "safe_name", "scale_of"]


def scale_of(report: RunReport) -> tuple[float, str]:
    """By what a metric is multiplied to be shown, and its name with the unit: percent where it is a share."""
    metrics = [r.metric for r in report.networks if math.isfinite(r.metric)]
    shares = report.metric_mode == "max" and all(0 <= metric <= 1 for metric in metrics)
    return (100.0, f"{report.metric_name}, %") if shares else (1.0, report.metric_name)


def metric_text(report: RunReport, value: float | None) -> str:
    """``99.72 %`` for a share, ``4.2092`` for others."""
    if value is None or not math.isfinite(value):
        return "–" if value is None else "nan"
    return percent_text(value, 2) if scale_of(report)[0] == 100 else f"{value:.4f}"


def safe_name(name: str) -> str:
    """A network's or pattern's name as part of a file's, on any system: ``2-4``, ``channel@0.5``."""
    return re.sub(r"[^A-Za-z0-9@._+-]+", "-", name).strip("-.") or "network"


def command_for(folder: Path, network: str) -> str:
    """The command that takes a network out of a run."""
    words = ["cocktail-cli", "export", str(folder), network, f"{safe_name(network)}.onnx"]
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


def front(costs: Mapping[str, float], metrics: Mapping[str, float], mode: str) -> frozenset[str]:
    """Networks that no other beats: none is as cheap and better, or as good and cheaper."""
    sign = 1 if mode == "max" else -1
    good = {n: sign * m for n, m in metrics.items() if n in costs and math.isfinite(m)}

    def beaten(n: str) -> bool:
        return any(
            costs[o] <= costs[n] and good[o] >= good[n] and (costs[o] < costs[n] or good[o] > good[n]) for o in good
        )

    return frozenset(n for n in good if not beaten(n))


def cost_charts(report: RunReport, folder: Path, profiles: Sequence[DeviceProfile] = ()) -> list[Chart]:
    """Metric against FLOPs, bytes, and latency wherever it was measured.

    Args:
        report: Of the run.
        folder: Where it is, for the commands.
        profiles: Measurements of its networks.
    """
    by_name = {r.name: r for r in report.networks}
    size: Mapping[str, int] = report.masks.get("bytes", {})
    flops, params = ({n: getattr(r, what) for n, r in by_name.items()} for what in ("flops", "params"))
    charts = [_chart(report, folder, "flops", "Computation", "FLOPs", flops, flops_text)]
    if size:
        stored = {n: size[n] for n in by_name if n in size}
        charts.append(_chart(report, folder, "bytes", "Storage", "bytes", stored, bytes_text))
    else:
        charts.append(_chart(report, folder, "parameters", "Storage", "parameters", params, count_text))
    for i, profile in enumerate(profiles):
        device = profile.machine.get("device", "?")
        where = profile.machine.get("processor", device) if device == "cpu" else device
        for batch in [t.batch for t in profile.networks[0].timings]:
            found = {c.name: c.timing(batch).latency_ms for c in profile.networks if c.name in by_name}
            if len(found) > 1:
                title = f"Latency, batch {batch}: {profile.runtime} on {where}, threads: {profile.threads}"
                name = f"latency-{i}-batch-{batch}"
                charts.append(_chart(report, folder, name, title, "milliseconds", found, "{:.2f} ms".format))
    return charts


def _chart(
    report: RunReport,
    folder: Path,
    name: str,
    title: str,
    cost: str,
    costs: Mapping[str, float],
    text: Callable[[float], str],
) -> Chart:
    scale, label = scale_of(report)
    rows = [r for r in report.networks if r.name in costs]
    dense = next((r for r in rows if r.pattern == "dense"), None)
    dense_cost = costs[dense.name] if dense is not None else 0.0
    best = front(costs, {r.name: r.metric for r in rows}, report.metric_mode)

    def description(row: NetworkRow) -> str:
        relative = dense_cost and row is not dense
        share = f" ({percent_text(costs[row.name] / dense_cost, 0)} of dense)" if relative else ""
        lines = [
            row.name + (", on the front" if row.name in best else ""),
            f"{report.metric_name} {metric_text(report, row.metric)}",
            f"{text(costs[row.name])}{share}",
            f"{count_text(row.params)} parameters kept",
            command_for(folder, row.name),
        ]
        return "\n".join(lines)

    series = []
    for pattern, of in grouped((row.pattern, row) for row in rows).items():
        drawn = [r for r in of if math.isfinite(r.metric)]
        marks = tuple(Mark(costs[r.name], scale * r.metric, description(r), strong=r.name in best) for r in drawn)
        line = tuple((m.x, m.y) for m in marks) if _joined(pattern, [costs[r.name] for r in of]) else ()
        series.append(Series(pattern, pattern, marks, line, networks=tuple(r.name for r in of)))
    shown = few(sorted(best, key=lambda n: costs[n]), 5)
    table = Table(
        ("network", report.metric_name, cost, "of dense", "on the front"),
        tuple(
            (
                r.name,
                metric_text(report, r.metric),
                text(costs[r.name]),
                percent_text(costs[r.name] / dense_cost) if dense_cost else "–",
                "yes" if r.name in best else "",
            )
            for r in rows
        ),
        tuple(r.name for r in rows),
        tuple(r.pattern for r in rows),
    )
    return Chart(
        name=name,
        title=title,
        summary=f"Test {report.metric_name} of {len(rows)} networks against {cost}; on the front: {shown}.",
        x=cost,
        y=f"test {label}",
        series=tuple(series),
        table=table,
        level=None if dense is None or not math.isfinite(dense.metric) else (scale * dense.metric, "dense"),
    )


def _joined(pattern: str, costs: Sequence[float]) -> bool:
    """Whether a line through the points says something: not where all cost the same, nor for a few N:M."""
    return pattern != "n:m" and len(set(costs)) > 1
