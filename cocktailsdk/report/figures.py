"""The report's figures as files, for papers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..utils.optional import check_installed
from .costs_charts import cost_charts, safe_name
from .drawing import write_chart, write_matrix
from .looks import looks_of
from .page_masks import MOST_ROWS, sparsity_maps
from .run import RunReport
from .training_charts import merge_charts, training_charts

if TYPE_CHECKING:
    from ..choosing.profile import DeviceProfile

__all__ = ["FORMATS", "write_figures"]

FORMATS = (".png", ".svg")


def write_figures(
    report: RunReport, run: Path, folder: Path, profiles: Sequence[DeviceProfile] = (), formats: Sequence[str] = FORMATS
) -> list[Path]:
    """Write all figures of a run, each as PNG (200 dots an inch) and SVG; the same bytes for the same run.

    Args:
        report: Of the run.
        run: Its folder.
        folder: Where they go; made where it does not exist.
        profiles: Measurements of its networks.
        formats: Endings of files.

    Returns:
        The files.
    """
    check_installed("matplotlib", purpose="drawing figures")
    folder.mkdir(parents=True, exist_ok=True)
    looks, out = looks_of([report]), []
    for chart in [*cost_charts(report, run, profiles), *training_charts(report), *merge_charts(report)]:
        for ending in formats:
            out.append(folder / f"{chart.name}{ending}")
            write_chart(chart, looks, out[-1])
    for found in sparsity_maps(report):
        names, values = found.layers, found.values
        if len(names) > MOST_ROWS:
            names, values = found.by_block()
        columns = [f"{n} ({r})" if r else n for n, r in zip(found.networks, found.rounds, strict=True)]
        for ending in formats:
            out.append(folder / f"sparsity-{safe_name(found.pattern)}{ending}")
            write_matrix(values, names, columns, f"{found.pattern}: zeros by layer, %", out[-1])
    if report.masks and report.masks["names"]:
        names = report.masks["names"]
        for ending in formats:
            out.append(folder / f"overlap{ending}")
            write_matrix(report.masks["overlap"], names, names, "Overlap of kept weights, %", out[-1])
    return out
