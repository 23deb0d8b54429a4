"""The picture of a run: metric against FLOPs and against parameters kept, by pattern."""

from __future__ import annotations

from pathlib import Path

from ..utils.grouping import grouped
from .drawing import new_figure
from .run import RunReport

__all__ = ["write_figure"]

# Okabe and Ito's colours, told apart with any kind of colour vision; shapes say the same again.
_LOOKS = {"unstructured": ("#0072B2", "o"), "channel": ("#E69F00", "s"), "n:m": ("#009E73", "^")}
_OTHERS = [(colour, marker) for marker in "DvPX*" for colour in ("#CC79A7", "#D55E00", "#56B4E9")]


def write_figure(report: RunReport, path: Path) -> None:
    """Write the picture, in the format that the path's ending names.

    The points' places depend on the report alone; nothing of it on the clock.
    """
    figure = new_figure(figsize=(9.0, 4.2), dpi=160, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    dense = next((r for r in report.networks if r.pattern == "dense"), None)
    patterns = grouped((row.pattern, row) for row in report.networks if row is not dense)
    further = [pattern for pattern in patterns if pattern not in _LOOKS]
    looks = {**_LOOKS, **{pattern: _OTHERS[i % len(_OTHERS)] for i, pattern in enumerate(further)}}
    for axes, field, label in ((left, "flops", "FLOPs"), (right, "params", "parameters kept")):
        dense_value = getattr(dense, field) if dense is not None else max(getattr(r, field) for r in report.networks)
        for pattern, rows in patterns.items():
            colour, marker = looks[pattern]
            axes.plot(
                [100 * getattr(r, field) / dense_value for r in rows],
                [100 * r.metric for r in rows],
                color=colour,
                marker=marker,
                markersize=6,
                linewidth=1.2,
                linestyle="-" if pattern != "n:m" else "none",
                label=pattern,
            )
        if dense is not None:
            axes.axhline(100 * dense.metric, color="black", linestyle="--", linewidth=1.0, label="dense")
        axes.set_xlabel(f"{label}, % of dense")
        axes.set_xlim(0, 105)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    left.set_ylabel(f"test {report.metric_name}, %")
    left.set_title("What dense kernels compute", fontsize="medium")
    right.set_title("What is left of the weights", fontsize="medium")
    handles, labels = right.get_legend_handles_labels()
    right.legend(handles, labels, frameon=False, loc="lower right")
    figure.suptitle(f"{len(report.networks)} networks in one bundle: {report.model} on {report.preset}")
    figure.savefig(path, metadata={"Software": None} if path.suffix == ".png" else None)
