"""A run, or two side by side, as one HTML page that makes no request."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..utils.optional import check_installed
from ..utils.score_text import score_text
from .chart import Chart
from .costs_charts import cost_charts, metric_text
from .drawing import Limits, inline_svg, limits_of
from .looks import DARK, GRID, INK, PAPER, Look, looks_of
from .numbers import bytes_text, duration_text
from .page_masks import mask_overlap, sparsity_heat_maps, unpruned_layers
from .page_tables import differing_settings, networks_of_both, networks_table
from .rendering import asset, render
from .run import RunReport
from .training_charts import merge_charts, training_charts

if TYPE_CHECKING:
    from ..choosing.profile import DeviceProfile

__all__ = ["ReportedRun", "report_page"]

PREFIXES = "ab"
"""Begin the ids of elements of the first and of the second run, so that no id occurs twice in the page."""


@dataclass(frozen=True)
class ReportedRun:
    """A run to be shown.

    Attributes:
        report: Its report.
        folder: Where it is, as its commands are to name it.
        profiles: Measurements of its networks.
    """

    report: RunReport
    folder: Path
    profiles: Sequence[DeviceProfile] = field(default=())

    @property
    def title(self) -> str:
        """``resnet8 on digits``."""
        of = f" on {self.report.preset}" if self.report.preset else ""
        return f"{self.report.model or 'networks'}{of}"


def report_page(runs: Sequence[ReportedRun]) -> str:
    """The page.

    Args:
        runs: One, or two to be laid side by side.
    """
    check_installed("matplotlib", purpose="drawing the charts of a report")
    looks = looks_of(run.report for run in runs)
    return render(
        "page.html.j2",
        title=" and ".join(dict.fromkeys(f"{run.title} ({run.folder.name})" for run in runs)),
        css=asset("page.css"),
        js=asset("page.js"),
        looks=looks,
        dark={"ink": DARK[INK], "grid": DARK[GRID], "paper": DARK[PAPER]},
        patterns={row.pattern for run in runs for row in run.report.networks},
        runs=[_run_values(run, prefix) for run, prefix in zip(runs, PREFIXES, strict=False)],
        compared=_compared(*runs) if len(runs) == 2 else None,
        cost_charts=_charts(runs, looks, lambda run: cost_charts(run.report, run.folder, run.profiles)),
        training_charts=_charts(runs, looks, lambda run: training_charts(run.report)),
        merging_charts=_charts(runs, looks, lambda run: merge_charts(run.report)),
    )


def _run_values(run: ReportedRun, prefix: str) -> dict[str, Any]:
    """The values of one run that the template shows."""
    report = run.report
    return {
        "name": run.folder.name,
        "folder": run.folder,
        "prefix": prefix,
        "measured": bool(run.profiles),
        "facts": _facts(report),
        "networks": networks_table(report, run.folder),
        "sparsity": sparsity_heat_maps(report),
        "overlap": mask_overlap(report),
        "unpruned": unpruned_layers(report),
        "provenance": _provenance(run),
        "configuration": json.dumps(report.configuration, indent=1) if report.configuration else "",
    }


def _compared(a: ReportedRun, b: ReportedRun) -> dict[str, Any]:
    labels = (a.folder.name, b.folder.name)
    if a.folder.name == b.folder.name:
        labels = (str(a.folder), str(b.folder))
    return {
        "networks": networks_of_both(a.report, b.report, labels),
        "settings": differing_settings(a.report, b.report, labels),
    }


def _charts(
    runs: Sequence[ReportedRun], looks: dict[str, Look], make: Callable[[ReportedRun], list[Chart]]
) -> list[list[dict[str, Any] | None]]:
    """Charts by name, with one for every run; ``None`` for a run without it.

    Charts of one name have the same limits, so that two runs can be compared.
    """
    by_run = [{chart.name: chart for chart in make(run)} for run in runs]
    rows = []
    for name in dict.fromkeys(name for charts in by_run for name in charts):
        limits = limits_of([charts[name] for charts in by_run if name in charts]) if len(runs) > 1 else None
        row: list[dict[str, Any] | None] = []
        for charts, run, prefix in zip(by_run, runs, PREFIXES, strict=False):
            of = run.folder.name if len(runs) > 1 else ""
            row.append(_figure(charts[name], looks, prefix, of, limits) if name in charts else None)
        rows.append(row)
    return rows


def _figure(chart: Chart, looks: dict[str, Look], prefix: str, run: str, limits: Limits | None) -> dict[str, Any]:
    svg = inline_svg(chart, looks, f"{prefix}-{chart.name}", limits)
    return {
        "title": f"{chart.title} ({run})" if run else chart.title,
        "svg": svg.replace("<svg", f'<svg data-run="{prefix}"', 1),
        "summary": chart.summary,
        "table": chart.table,
        "caption": chart.title,
    }


def _facts(report: RunReport) -> dict[str, str]:
    known = [n for n in report.networks if math.isfinite(n.metric)]
    best = max(known, key=lambda n: n.metric if report.metric_mode == "max" else -n.metric, default=None)
    dense = next((n for n in report.networks if n.pattern == "dense"), None)
    size = f"{bytes_text(report.bundle_bytes)}, {report.bundle_bytes / max(report.dense_bytes, 1):.2f}"
    change = {}
    if dense is not None and report.dense_before is not None:
        before, after = metric_text(report, report.dense_before), metric_text(report, dense.held_out)
        change = {f"dense {report.metric_name}, held out": f"{before} before, {after} after"}
    return {
        "networks in one bundle": str(len(report.networks)),
        f"dense {report.metric_name}": metric_text(report, dense.metric) if dense is not None else "–",
        **change,
        f"best {report.metric_name}": "–" if best is None else f"{metric_text(report, best.metric)} ({best.name})",
        "bundle": f"{size} × one dense checkpoint",
        "training time": duration_text(report.seconds),
    }


def _provenance(run: ReportedRun) -> dict[str, str]:
    report, history = run.report, run.report.history
    rows = {
        "folder": str(run.folder),
        "model": report.model or "–",
        "preset": report.preset or "–",
        "recipe": str(_value_at(report.configuration, "training", "recipe", "name") or "–"),
        **({"masks ranked by": text} if (text := score_text(report.score)) else {}),
        "seed": str(report.seed),
        **{str(k): str(v) for k, v in report.environment.items()},
        "configuration (SHA-256)": report.fingerprint or "–",
    }
    if history:
        rows["optimizer steps"] = f"{history.get('steps', 0):,}"
        rows["forward and backward passes"] = f"{history.get('passes', 0):,}"
        if history.get("to_judge"):
            rows["merging judged"] = f"{history['judged']:,} of {history['to_judge']:,} candidate networks"
        if history.get("skipped"):
            rows["steps left out (not finite)"] = f"{history['skipped']:,}"
    for profile in run.profiles:
        machine = ", ".join(f"{k} {v}" for k, v in profile.machine.items())
        rows[f"measured with {profile.runtime}"] = f"{machine}, threads {profile.threads}, {profile.repeats} repeats"
    return rows


def _value_at(value: Any, *keys: str) -> Any:
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value
