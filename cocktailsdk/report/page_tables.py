"""The page's tables of networks, alone and compared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .chart import Table
from .costs_charts import command_for, metric_text, safe_name
from .numbers import bytes_text, count_text
from .run import NetworkRow, RunReport

__all__ = ["NetworksTable", "differences", "differing_settings", "networks_of_both", "networks_table"]


@dataclass(frozen=True)
class TableRow:
    """One network.

    Attributes:
        id: Its name in the row's id.
        name: The network.
        pattern: Its pattern.
        cells: Texts, and the numbers by which the page sorts.
        command: Extracts the network.
    """

    id: str
    name: str
    pattern: str
    cells: tuple[tuple[str, float | None], ...]
    command: str


@dataclass(frozen=True)
class NetworksTable:
    """Every network in numbers, with the command that extracts it."""

    columns: tuple[str, ...]
    rows: tuple[TableRow, ...]


def networks_table(report: RunReport, folder: Path) -> NetworksTable:
    """The table of a run's networks."""
    size: Mapping[str, int] = report.masks.get("bytes", {})
    metrics = (report.metric_name, "held out")
    costs = ("parameters", *(["bytes"] if size else []), "FLOPs", "non-zero MACs")
    passes = report.passes
    return NetworksTable(
        ("network", "sparsity", *metrics, *costs, *(["passes"] if passes else [])),
        tuple(_row(report, row, folder, size, passes) for row in report.networks),
    )


def _row(
    report: RunReport, row: NetworkRow, folder: Path, size: Mapping[str, int], passes: Mapping[str, int]
) -> TableRow:
    cells: list[tuple[str, float | None]] = [
        (f"{row.sparsity_exact:.3f}", row.sparsity_exact),
        (metric_text(report, row.metric), row.metric),
        (metric_text(report, row.held_out), row.held_out),
        (count_text(row.params), row.params),
        *([(bytes_text(size[row.name]) if row.name in size else "–", size.get(row.name))] if size else []),
        (count_text(row.flops), row.flops),
        (count_text(row.nonzero_macs), row.nonzero_macs),
        *([(f"{passes.get(row.name, 0):,}", passes.get(row.name, 0))] if passes else []),
    ]
    return TableRow(safe_name(row.name), row.name, row.pattern, tuple(cells), command_for(folder, row.name))


def networks_of_both(a: RunReport, b: RunReport, labels: tuple[str, str]) -> Table:
    """The networks of two runs, metric beside metric.

    Args:
        a: The first run's report.
        b: The second run's.
        labels: The names of the runs.
    """
    first, second = ({r.name: r for r in report.networks} for report in (a, b))
    names = tuple(dict.fromkeys([*first, *second]))
    rows = [_compared(a, b, name, first.get(name), second.get(name)) for name in names]
    columns = [f"{a.metric_name}, {label}" for label in labels] + ["difference"]
    columns += [f"{what}, {label}" for what in ("parameters", "FLOPs") for label in labels]
    patterns = tuple((first.get(name) or second[name]).pattern for name in names)
    return Table(("network", *columns), tuple(rows), names, patterns)


def _compared(
    a: RunReport, b: RunReport, name: str, one: NetworkRow | None, other: NetworkRow | None
) -> tuple[str, ...]:
    both = (one, other)
    return (
        name,
        *(metric_text(report, row.metric) if row else "–" for report, row in zip((a, b), both, strict=True)),
        _difference(a, one, other),
        *(count_text(row.params) if row else "–" for row in both),
        *(count_text(row.flops) if row else "–" for row in both),
    )


def _difference(report: RunReport, one: NetworkRow | None, other: NetworkRow | None) -> str:
    if one is None or other is None:
        return "–"
    by = other.metric - one.metric
    return f"{100 * by:+.2f} points" if metric_text(report, one.metric).endswith("%") else f"{by:+.4f}"


def differing_settings(a: RunReport, b: RunReport, labels: tuple[str, str]) -> Table:
    """The settings in which two runs differ, with both values."""
    return Table(("setting", *labels), tuple(differences(_settings(a), _settings(b))))


def _settings(report: RunReport) -> dict[str, Any]:
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
