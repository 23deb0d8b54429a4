"""Charts of how a run went: losses, held-out metrics, and how its rounds were merged."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

from ..utils.grouping import grouped
from .chart import Chart, Mark, Series, Table
from .costs_charts import metric_text, scale_of
from .need import needs
from .run import RunReport

__all__ = ["merge_charts", "rounds_of", "training_charts"]

LOG_FROM = 20.0
"""Losses whose largest is so many times the smallest are drawn on a logarithmic axis."""


def rounds_of(report: RunReport) -> dict[str, int]:
    """The round in which each network first trained."""
    found: dict[str, int] = {}
    for record in report.history.get("rounds", ()):
        for name in record["networks"]:
            found.setdefault(name, record["round"])
    return found


def training_charts(report: RunReport) -> list[Chart]:
    """Training loss by epoch, held-out metric by round and measured need, of every network, as far as recorded."""
    rounds: Sequence[Mapping[str, Any]] = report.history.get("rounds", ())
    patterns = {r.name: r.pattern for r in report.networks}
    charts = []
    if any(epoch for record in rounds for epoch in record["losses"]):
        charts.append(_losses(rounds, patterns))
    if any(record["metrics"] for record in rounds) or any(r.held_out is not None for r in report.networks):
        charts.append(_held_out(report, rounds, patterns))
    if report.history.get("measured"):
        charts.append(_need(report, patterns))
    return charts


def _need(report: RunReport, patterns: Mapping[str, str]) -> Chart:
    measured = report.history["measured"]
    reference = measured[0]["losses"].get("dense")
    gaps = {int(one["step"]): needs(one["losses"], reference) for one in measured}
    points = {n: [(float(step), gap[n]) for step, gap in gaps.items() if n in gap] for n in patterns}
    passes = report.passes

    def told(name: str, step: float, gap: float) -> str:
        return f"{name}, step {step:,.0f}\nloss {gap:+.3g} above the start\n{passes.get(name, 0):,} passes in all"

    series = tuple(
        Series(name, patterns[name], tuple(Mark(x, y, told(name, x, y)) for x, y in of), tuple(of), network=name)
        for name, of in points.items()
        if of
    )
    names = [s.network for s in series]
    table = Table(
        ("network", *(f"step {step:,}" for step in gaps), "passes in all"),
        tuple((n, *(f"{g[n]:+.3g}" if n in g else "" for g in gaps.values()), f"{passes.get(n, 0):,}") for n in names),
        tuple(names),
        tuple(patterns[n] for n in names),
    )
    return Chart(
        name="need",
        title="Measured need by step",
        summary="Held-out loss of each network above that of the weights that the run started from. The next passes go "
        "to the networks with the largest gap within their pattern.",
        x="optimizer step",
        y="held-out loss above the start",
        series=series,
        table=table,
        integer_x=True,
    )


def _losses(rounds: Sequence[Mapping[str, Any]], patterns: Mapping[str, str]) -> Chart:
    epochs = [(record["round"], losses) for record in rounds for losses in record["losses"]]
    lines = grouped(
        ((name, k), (float(at), loss))
        for at, (k, losses) in enumerate(epochs, 1)
        for name, loss in losses.items()
        if loss is not None
    )
    ends = list(accumulate(len(record["losses"]) for record in rounds))
    names = [n for n in patterns if any(n == name for name, _ in lines)]
    series = tuple(
        Series(
            name,
            patterns.get(name, ""),
            (Mark(*points[-1], f"{name}, round {k}\ntraining loss {points[-1][1]:.4g} at its end"),),
            tuple(points),
            network=name,
        )
        for (name, k), points in lines.items()
    )
    numbers = [record["round"] for record in rounds]
    table = Table(
        ("network", *(f"round {k}" for k in numbers)),
        tuple((n, *(f"{lines[n, k][-1][1]:.4g}" if (n, k) in lines else "" for k in numbers)) for n in names),
        tuple(names),
        tuple(patterns[n] for n in names),
    )
    values = [y for points in lines.values() for _, y in points]
    return Chart(
        name="losses",
        title="Training loss by epoch",
        summary=f"Mean training loss of {len(names)} networks over {len(epochs)} epochs in {len(rounds)} rounds.",
        x="epoch (lines between rounds)",
        y="training loss",
        series=series,
        table=table,
        log_y=min(values) > 0 and max(values) > LOG_FROM * min(values),
        integer_x=True,
        splits=tuple(end + 0.5 for end in ends[:-1]),
    )


def _held_out(report: RunReport, rounds: Sequence[Mapping[str, Any]], patterns: Mapping[str, str]) -> Chart:
    scale, label = scale_of(report)
    end = max((record["round"] for record in rounds), default=0) + 1
    ended = any(r.held_out is not None for r in report.networks)
    found = [(name, (record["round"], value)) for record in rounds for name, value in record["metrics"].items()]
    found += [(row.name, (end, row.held_out)) for row in report.networks]
    points = grouped((name, (k, v)) for name, (k, v) in found if v is not None and (k < end or math.isfinite(v)))
    names = [n for n in patterns if n in points]

    def when(k: int) -> str:
        return "at the end" if k == end and ended else f"round {k}"

    series = tuple(
        Series(
            name,
            patterns[name],
            tuple(Mark(k, scale * v, f"{name}, {when(k)}\nheld out {metric_text(report, v)}") for k, v in points[name]),
            tuple((k, scale * v) for k, v in points[name]) if len(points[name]) > 1 else (),
            network=name,
        )
        for name in names
    )
    known = sorted({k for of in points.values() for k, _ in of})
    table = Table(
        ("network", *map(when, known)),
        tuple(
            (n, *(metric_text(report, v) if (v := dict(points[n]).get(k)) is not None else "" for k in known))
            for n in names
        ),
        tuple(names),
        tuple(patterns[n] for n in names),
    )
    return Chart(
        name="held-out",
        title="Held-out metric by round",
        summary=f"Held-out {report.metric_name} of {len(names)} networks at the end of each round, and of the run.",
        x=f"round ({end}: the finished bundle)" if ended else "round",
        y=f"held-out {label}",
        series=series,
        table=table,
        integer_x=True,
    )


def merge_charts(report: RunReport) -> list[Chart]:
    """The chosen α by round, and the metric along the line between merged and new weights."""
    if not report.alphas:
        return []
    merged = report.history.get("merged", ())
    values = {k: value for k, value in enumerate(merged, 2) if value is not None}
    scale, label = scale_of(report)
    alphas = list(enumerate(report.alphas, 2))
    marks = []
    for k, a in alphas:
        told = f"\nheld-out mean {metric_text(report, values[k])}" if k in values else ""
        marks.append(Mark(k, a, f"round {k}: α {a:g}{told}"))
    chosen = Chart(
        name="alphas",
        title="Chosen α by round",
        summary="The interpolation coefficient α that was chosen when each round was merged in: "
        + ", ".join(f"round {k} {a:g}" for k, a in alphas)
        + ". At 1 the round's own weights were rejected.",
        x="round",
        y="α kept of what was merged before",
        series=(Series("α", "", tuple(marks), tuple((m.x, m.y) for m in marks)),),
        table=Table(
            ("round", "α", f"mean held-out {report.metric_name}"),
            tuple((f"{k}", f"{a:g}", metric_text(report, values.get(k))) for k, a in alphas),
        ),
        integer_x=True,
        y_range=(0.0, 1.08),
    )
    curves = [c for c in report.history.get("curves", ()) if c["points"]]
    return [chosen, _interpolation(report, curves, scale, label)] if curves else [chosen]


def _interpolation(report: RunReport, curves: Sequence[Mapping[str, Any]], scale: float, label: str) -> Chart:
    series, rows = [], []
    for curve in curves:
        k = int(curve["round"])
        alpha = report.alphas[k - 2] if k - 2 < len(report.alphas) else None
        marks = []
        for p in curve["points"]:
            bound = "metric" not in p
            value = p["bound"] if bound else p["metric"]
            if value is None:
                continue
            limit = "at most" if report.metric_mode == "max" else "at least"
            value_text = f"{limit} {metric_text(report, value)}, given up" if bound else metric_text(report, value)
            here = p["alpha"] == alpha
            description = f"round {k}, α {p['alpha']:g}{', chosen' if here else ''}\nmean held out {value_text}"
            marks.append(Mark(p["alpha"], scale * value, description, bound, here, f"{k}" if here else ""))
            rows.append((f"{k}", f"{p['alpha']:g}", value_text, "yes" if here else ""))
        line = tuple((m.x, m.y) for m in marks if not m.hollow)
        series.append(Series(f"round {k}", "", tuple(marks), line))
    return Chart(
        name="interpolation",
        title="Between merged and new weights",
        summary="Mean held-out metric at each α, a line for each round. The chosen α has a large mark. Outlines are "
        "values of α that were given up, at the most they could still have reached.",
        x="α kept of what was merged before",
        y=f"mean held-out {label}",
        series=tuple(series),
        table=Table(("round", "α", f"mean held-out {report.metric_name}", "chosen"), tuple(rows)),
    )
