"""The page's tables of networks, alone and compared."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .chart import Table
from .costs_charts import command_for, metric_text, safe_name
from .html import attributes, escape, table_html
from .numbers import bytes_text, count_text
from .run import NetworkRow, RunReport

if TYPE_CHECKING:
    from .page import ReportedRun

__all__ = ["comparison_table", "differences", "differences_table", "networks_table"]


def networks_table(report: RunReport, folder: Path, prefix: str) -> str:
    """Every network in numbers, with the command that takes it out; its columns can be sorted."""
    size: Mapping[str, int] = report.masks.get("bytes", {})
    columns = [
        "network",
        "sparsity",
        report.metric_name,
        "held out",
        "parameters",
        *(["bytes"] if size else []),
        "FLOPs",
        "non-zero MACs",
    ]
    head = "".join(f'<th scope="col"><button type="button">{escape(c)}</button></th>' for c in columns)
    head += '<th scope="col" class="text">command</th>'
    rows = "".join(_row(report, row, folder, prefix, size) for row in report.networks)
    return (
        '<div class="scroll" role="region" tabindex="0" aria-label="All networks"><table>'
        "<caption>All networks; a click on a heading sorts</caption>"
        f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _row(report: RunReport, row: NetworkRow, folder: Path, prefix: str, size: Mapping[str, int]) -> str:
    cells: list[tuple[str, float | None]] = [
        (f"{row.sparsity_exact:.3f}", row.sparsity_exact),
        (metric_text(report, row.metric), row.metric),
        (metric_text(report, row.held_out), row.held_out),
        (count_text(row.params), row.params),
        *([(bytes_text(size[row.name]) if row.name in size else "–", size.get(row.name))] if size else []),
        (count_text(row.flops), row.flops),
        (count_text(row.nonzero_macs), row.nonzero_macs),
    ]
    inner = "".join(f'<td data-value="{-1 if value is None else value}">{escape(text)}</td>' for text, value in cells)
    marks = attributes(pattern=row.pattern, network=row.name, run=prefix, row=row.name)
    command = f"<code>{escape(command_for(folder, row.name))}</code> <button type='button' class='copy'>copy</button>"
    return (
        f'<tr id="{prefix}-network-{safe_name(row.name)}"{marks}><th scope="row">{escape(row.name)}</th>{inner}'
        f'<td class="command">{command}</td></tr>'
    )


def comparison_table(a: ReportedRun, b: ReportedRun) -> str:
    """The networks of two runs, metric beside metric."""
    left, right = ({r.name: r for r in run.report.networks} for run in (a, b))
    names = list(dict.fromkeys([*left, *right]))
    rows, patterns = [], []
    for name in names:
        one, other = left.get(name), right.get(name)
        row = one or other
        assert row is not None
        patterns.append(row.pattern)
        rows.append(
            (
                name,
                metric_text(a.report, one.metric) if one else "–",
                metric_text(b.report, other.metric) if other else "–",
                _difference(a.report, one, other),
                count_text(one.params) if one else "–",
                count_text(other.params) if other else "–",
                count_text(one.flops) if one else "–",
                count_text(other.flops) if other else "–",
            )
        )
    first, second = _labels(a, b)
    columns = ["network"]
    columns += [f"{what}, {label}" for what in (a.report.metric_name,) for label in (first, second)] + ["difference"]
    columns += [f"{what}, {label}" for what in ("parameters", "FLOPs") for label in (first, second)]
    return table_html(Table(tuple(columns), tuple(rows), tuple(names), tuple(patterns)), "Networks of both runs")


def _labels(a: ReportedRun, b: ReportedRun) -> tuple[str, str]:
    return (a.folder.name, b.folder.name) if a.folder.name != b.folder.name else (str(a.folder), str(b.folder))


def _difference(report: RunReport, one: NetworkRow | None, other: NetworkRow | None) -> str:
    if one is None or other is None:
        return "–"
    by = other.metric - one.metric
    return f"{100 * by:+.2f} points" if metric_text(report, one.metric).endswith("%") else f"{by:+.4f}"


def differences_table(a: ReportedRun, b: ReportedRun) -> str:
    """What the runs were asked to do otherwise, and where."""
    found = differences(_told(a.report), _told(b.report))
    if not found:
        return "<p>Both runs were asked to do the same, in the same environment.</p>"
    first, second = _labels(a, b)
    return table_html(Table(("setting", first, second), tuple(found)), "Settings that differ")


def _told(report: RunReport) -> dict[str, Any]:
    return {
        "preset": report.preset,
        "model": report.model,
        "seed": report.seed,
        "bundle bytes": report.bundle_bytes,
        "environment": dict(report.environment),
        "configuration": dict(report.configuration),
    }


def differences(one: Any, other: Any, key: str = "") -> list[tuple[str, str, str]]:
    """Where two trees of JSON values differ: the place, and both values."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        out = []
        for name in dict.fromkeys([*one, *other]):
            out += differences(one.get(name), other.get(name), f"{key}.{name}" if key else str(name))
        return out
    return [] if one == other else [(key, _short(one), _short(other))]


def _short(value: Any) -> str:
    text = "–" if value is None else str(value)
    return text if len(text) <= 80 else f"{text[:77]}…"
