"""Tables of networks, for terminals."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from .numbers import bytes_text, count_text, duration_text
from .run import NetworkRow, RunReport

__all__ = ["STYLES", "dense_change", "networks_table", "plain_table", "run_view", "size_line"]

STYLES = {"dense": "bold", "unstructured": "blue", "channel": "yellow", "n:m": "green"}
"""Colours of the patterns; the same order as in the picture."""


def plain_table(*columns: str, right: Iterable[int] = (), title: str | None = None) -> Table:
    """A table without walls, whose numbers stand to the right."""
    table = Table(
        box=None,
        pad_edge=False,
        title=None if title is None else Text(title, style="bold"),  # as text, or ':M:' would become a picture
        title_justify="left",
        header_style="bold",
    )
    wanted = set(right)
    for i, name in enumerate(columns):
        table.add_column(Text(name), justify="right" if i in wanted else "left", no_wrap=i in wanted, overflow="fold")
    return table


def networks_table(
    rows: Iterable[NetworkRow], metric: str = "accuracy", on: str = "test", passes: Mapping[str, int] | None = None
) -> Table:
    """Name, sparsity asked and exact, metric, parameters kept, FLOPs; and passes, if they are given."""
    more = ("passes",) if passes else ()
    table = plain_table("network", "asked", "exact", f"{on}\n{metric}", "params", "FLOPs", *more, right=range(1, 7))
    pattern = None
    for row in rows:
        if pattern is not None and row.pattern != pattern:
            table.add_row()
        pattern = row.pattern
        table.add_row(
            Text(row.name, style=STYLES.get(row.pattern, "magenta")),
            f"{row.sparsity:.3f}",
            f"{row.sparsity_exact:.4f}",
            f"{row.metric:.4f}",
            count_text(row.params),
            count_text(row.flops),
            *([f"{passes.get(row.name, 0):,}"] if passes else []),
        )
    return table


def size_line(report: RunReport) -> str:
    """The bundle's bytes against one dense checkpoint's and against one for each network."""
    count = len(report.networks)
    apart = count * report.dense_bytes
    return (
        f"bundle of {count} networks: {bytes_text(report.bundle_bytes)}, "
        f"{report.bundle_bytes / report.dense_bytes:.2f} x one dense checkpoint ({bytes_text(report.dense_bytes)}), "
        f"{report.bundle_bytes / apart:.3f} x {count} of them ({bytes_text(apart)})"
    )


def _private_line(report: RunReport) -> list[Text]:
    """The bytes of all private tensors, where there are any."""
    own = [row.private_bytes for row in report.networks if row.private_bytes]
    return [Text(f"of these, private tensors of {len(own)} networks: {bytes_text(sum(own))}")] if own else []


def run_view(report: RunReport) -> RenderableType:
    """What a finished run prints."""
    change = dense_change(report)
    return Group(
        networks_table(report.networks, report.metric_name, passes=report.passes),
        Text(),
        *([] if change is None else [Text(f"dense, held-out {report.metric_name}: {change}")]),
        Text(size_line(report)),
        *_private_line(report),
        Text(f"training time: {duration_text(report.seconds)}"),
    )


def dense_change(report: RunReport) -> str | None:
    """``0.8210 before training, 0.8240 after``; ``None`` if the run did not start from trained weights."""
    after = next((row.held_out for row in report.networks if row.pattern == "dense"), None)
    if report.dense_before is None or after is None:
        return None
    return f"{report.dense_before:.4f} before training, {after:.4f} after"
