"""The comparison of methods as pictures, after the paper's Figures 3, 6 and 7, and one that it lacks.

    python benchmarks/quality_figures.py        writes docs/assets/quality_*.png from benchmarks/results/

Accuracy by ratio of the method and its ablations; the shares that merging chose, round by round; the held-out metric
along the way from what was merged to a round's weights (from ``benchmarks/merging.py``); and how much of the weights
that a channel subnet keeps the unstructured subnet of the same level keeps too, with unified masks and without.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from statistics import mean
from typing import Any

from quality_rows import Row, read

HERE = Path(__file__).resolve().parent
ASSETS = HERE.parent / "docs" / "assets"
MERGING = HERE / "results" / "merging.json"
COLOURS = ("#000000", "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#7F7F7F")
MARKERS = "os^DvPX*"
ABLATIONS = (
    "paper",
    "paper-no-umg",
    "paper-rotation",
    "paper-no-merging",
    "paper-no-rewinding",
    "paper-no-distillation",
)


def of(rows: Iterable[Row], method: str, task: str = "cifar") -> list[Row]:
    """The rows of a method in which all patterns train."""
    return [r for r in rows if (r["task"], r["method"], r["pattern"]) == (task, method, "all")]


def by_level(rows: Iterable[Row], pattern: str) -> dict[float, float]:
    """Accuracy in % by sparsity, the mean over seeds; of N:M by N:M's place in 1:2, 2:4, 4:8."""
    found: dict[str, list[float]] = {}
    for row in rows:
        for name, value in row["networks"].items():
            if (":" in name) if pattern == "n:m" else name.startswith(f"{pattern}@"):
                found.setdefault(name, []).append(100 * value)
    places = {name: float(name.partition("@")[2] or i) for i, name in enumerate(sorted(found))}
    return dict(sorted((places[name], mean(values)) for name, values in found.items()))


def _axes(columns: int, title: str) -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # without pyplot, which keeps figures and a backend for the whole process

    figure = Figure(figsize=(1.2 + 3.6 * columns, 3.8), dpi=150, layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for one in axes:
        one.grid(alpha=0.25)
        for side in ("top", "right"):
            one.spines[side].set_visible(False)
    figure.suptitle(title)
    return figure, axes


def _lines(axes: Any, curves: Mapping[str, Mapping[float, float]], *, joined: bool = True) -> None:
    for i, (label, points) in enumerate(curves.items()):
        style = "-" if joined else "none"
        look = {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)], "linestyle": style}
        axes.plot(list(points), list(points.values()), label=label, markersize=5, linewidth=1.2, **look)


def ablations(rows: list[Row]) -> Any:
    """Accuracy by ratio of our default, the paper's method and its ablations (after the paper's Figure 3)."""
    shown = [m for m in ("cocktail", *ABLATIONS) if of(rows, m)]
    figure, axes = _axes(3, "ResNet-8 on CIFAR-10: the method, its parts, and our default")
    for one, pattern in zip(axes, ("unstructured", "channel", "n:m"), strict=True):
        _lines(one, {m: by_level(of(rows, m), pattern) for m in shown}, joined=pattern != "n:m")
        one.set_title(pattern, fontsize="medium")
        one.set_xlabel("sparsity" if pattern != "n:m" else "")
    axes[2].set_xticks([0, 1, 2], ["1:2", "2:4", "4:8"])
    axes[0].set_ylabel("test accuracy, %")
    axes[2].legend(frameon=False, fontsize="small")
    return figure


def alphas(rows: list[Row]) -> Any:
    """The share kept of what was merged before, by round (after the paper's Figure 6)."""
    figure, axes = _axes(2, "What merging chose: 1 rejects a round")
    for one, method in zip(axes, ("paper", "cocktail"), strict=True):
        runs = of(rows, method)
        _lines(one, {f"seed {r['seed']}": dict(enumerate(r["alphas"], start=2)) for r in runs})
        one.set_title(method, fontsize="medium")
        one.set_xlabel("round")
        one.set_ylim(0, 1.05)
        if runs:
            one.legend(frameon=False, fontsize="small")
    axes[0].set_ylabel("share α of the rounds before")
    return figure


def interpolation(row: Mapping[str, Any]) -> Any:
    """Mean held-out accuracy between the merged weights and a round's (after the paper's Figure 7)."""
    figure, axes = _axes(1, f"{row['title']}:\nheld-out accuracy along the way")
    curves = row["devices"]["full search"]["curves"]
    _lines(axes[0], {f"round {k}": {float(a): 100 * v for a, v in c.items()} for k, c in enumerate(curves, start=2)})
    axes[0].set_xlabel("share α of the rounds before")
    axes[0].set_ylabel("mean over networks, %")
    axes[0].legend(frameon=False, fontsize="x-small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def overlap(rows: list[Row]) -> Any:
    """Of the weights that a channel or the unstructured subnet of a level keeps, the share that both keep."""
    figure, axes = _axes(1, "Overlap of channel and unstructured masks, level by level")
    curves = {}
    for method, label in (("paper", "unified masks"), ("paper-no-umg", "each pattern for itself")):
        runs = of(rows, method)
        if runs:
            levels = runs[0]["overlap"]
            curves[label] = {float(name.partition("@")[2]): mean(r["overlap"][name] for r in runs) for name in levels}
    _lines(axes[0], curves)
    axes[0].set_xlabel("channel sparsity")
    axes[0].set_ylabel("intersection over union")
    axes[0].legend(frameon=False)
    return figure


def main() -> int:
    """The command."""
    rows = read()
    drawn: dict[str, Callable[[], Any]] = {
        "ablations": lambda: ablations(rows),
        "alphas": lambda: alphas(rows),
        "overlap": lambda: overlap(rows),
    }
    if MERGING.exists():
        drawn["interpolation"] = lambda: interpolation(json.loads(MERGING.read_text(encoding="utf-8")))
    ASSETS.mkdir(parents=True, exist_ok=True)
    for name, draw in drawn.items():
        draw().savefig(ASSETS / f"quality_{name}.png", metadata={"Software": None})
    return 0


if __name__ == "__main__":
    sys.exit(main())
