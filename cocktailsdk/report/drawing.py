"""Charts drawn with matplotlib: as files for papers, and as SVG that a page can colour, explain and filter.

Why matplotlib, and no JavaScript library: it is needed for the pictures in papers anyway, so that page and paper show
the same drawing; a chart comes to some 20 kB instead of the 4.6 MB that plotly's script adds to every page; it is there
without any script; and what it draws are elements of the page, which style sheets colour for dark paper, screen readers
read and keys reach, none of which plotly's charts offer by themselves.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from ..io.atomic import write_atomic
from ..utils.optional import require
from .chart import Chart, Series
from .looks import GRID, INK, PAPER, Look
from .numbers import bytes_text, count_text

__all__ = ["Limits", "inline_svg", "limits_of", "new_figure", "write_chart", "write_matrix"]

SIZE = (4.8, 3.5)  # inches: 346 points, about a phone's width, at which text is read as it is
CYCLE = ("o", "s", "^", "D", "v", "P", "X", "p", "h", "*")
"""Shapes of series that have no pattern."""

Limits = tuple[tuple[float, float], tuple[float, float]]

_PLAIN = {
    "font.size": 10.5,
    "axes.titlesize": 11,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": GRID,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.hashsalt": "cocktail",  # the same bytes every time
}


def new_figure(**options: Any) -> Any:
    """An empty figure, made without pyplot, which would keep figures and a backend for the whole process.

    Raises:
        CocktailError: matplotlib is not installed.
    """
    return require("matplotlib.figure", "drawing figures").Figure(**options)


@contextmanager
def _settings(**more: Any) -> Iterator[None]:
    """Settings of drawing for a while; the user's come back."""
    with require("matplotlib", "drawing figures").rc_context({**_PLAIN, **more}):
        yield


def limits_of(charts: Sequence[Chart]) -> Limits | None:
    """Limits within which all of some charts lie, so that they can be compared; ``None`` where nothing is drawn."""
    points = [p for c in charts for p in c.points()]
    points += [(points[0][0], c.level[0]) for c in charts if c.level is not None and points]
    if not points:
        return None
    return tuple((min(v), max(v)) for v in zip(*points, strict=True))  # type: ignore[return-value]


def write_chart(chart: Chart, looks: Mapping[str, Look], path: Path) -> None:
    """Write a chart, in the format that the path's ending names; the same bytes for the same data."""
    with _settings(**{"svg.fonttype": "path"}):
        figure, _ = _draw(chart, looks, None)
        figure.axes[0].set_title(chart.title)
        handles, labels = _legend(chart, looks)
        if len(handles) > 1:
            figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 4), frameon=False)
        _save(figure, path)


def write_matrix(
    values: Sequence[Sequence[float | None]], rows: Sequence[str], columns: Sequence[str], title: str, path: Path
) -> None:
    """Write a heat map of shares in [0, 1], each with its percentage while there is room."""
    with _settings(**{"svg.fonttype": "path", "axes.spines.left": False, "axes.spines.bottom": False}):
        figure = new_figure(figsize=(1.8 + 0.42 * len(columns), 1.6 + 0.24 * len(rows)), layout="constrained")
        axes = figure.subplots()
        table = [[float("nan") if v is None else v for v in row] for row in values]
        image = axes.imshow(table, vmin=0, vmax=1, cmap="cividis", aspect="auto", interpolation="nearest")
        axes.set_xticks(range(len(columns)), columns, rotation=60, ha="right", rotation_mode="anchor", fontsize=8)
        axes.set_yticks(range(len(rows)), rows, fontsize=8)
        axes.set_title(title)
        if len(rows) <= 60:
            for y, row in enumerate(values):
                for x, v in enumerate(row):
                    if v is not None:
                        axes.text(
                            x, y, f"{100 * v:.0f}", ha="center", va="center", fontsize=7,
                            color="white" if v < 0.5 else "black",
                        )  # fmt: skip
        figure.colorbar(image, ax=axes, format=lambda v, _: f"{100 * v:.0f} %")
        _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    buffer, kind = io.BytesIO(), path.suffix.lstrip(".")
    figure.savefig(buffer, format=kind, dpi=200, metadata={"Date": None} if kind == "svg" else {"Software": None})
    write_atomic(path, buffer.getvalue())


def _draw(chart: Chart, looks: Mapping[str, Look], limits: Limits | None) -> tuple[Any, dict[str, tuple[int, int]]]:
    """A figure, and of its named elements which series and mark they are; -1 for a line."""
    ticker = require("matplotlib.ticker", "drawing figures")
    figure = new_figure(figsize=SIZE, layout="constrained")
    axes = figure.subplots()
    axes.grid(alpha=0.7, linewidth=0.6)
    axes.set_axisbelow(True)
    elements: dict[str, tuple[int, int]] = {}
    for i, series in enumerate(chart.series):
        colour, marker = _look(series, i, looks)
        if series.line:
            elements[f"line-{i}"] = (i, -1)
            style = "-" if series.pattern else ("-", "--", ":", "-.")[i % 4]
            axes.plot(
                *zip(*series.line, strict=True),
                color=colour,
                linewidth=1.3,
                linestyle=style,
                gid=f"line-{i}",
                alpha=0.85,
            )
        for j, mark in enumerate(series.marks):
            elements[f"mark-{i}-{j}"] = (i, j)
            axes.plot(
                [mark.x],
                [mark.y],
                marker=marker,
                linestyle="none",
                color=colour,
                markersize=9 if mark.strong else 6,
                markerfacecolor=PAPER if mark.hollow else colour,
                markeredgecolor=INK if mark.strong else colour if mark.hollow else PAPER,
                markeredgewidth=1.2 if mark.strong or mark.hollow else 0.6,
                clip_on=False,
                zorder=3,
                gid=f"mark-{i}-{j}",
            )
            if mark.note:
                axes.annotate(mark.note, (mark.x, mark.y), (0, 7), textcoords="offset points", ha="center", fontsize=9)
    if limits is not None:
        (left, right), (low, high) = limits
        axes.update_datalim([(left, low), (right, high)])
        axes.autoscale_view()
    if chart.level is not None:
        axes.axhline(chart.level[0], color=INK, linestyle="--", linewidth=1.0)
        left_end, at = axes.get_yaxis_transform(), (0.0, chart.level[0])
        axes.annotate(chart.level[1], at, (4, -3), xycoords=left_end, textcoords="offset points", va="top", fontsize=9)
    for split in chart.splits:
        axes.axvline(split, color=GRID, linewidth=1.0)
    if chart.log_y:
        axes.set_yscale("log")
    if chart.integer_x:
        axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True, nbins=7))
    else:
        axes.xaxis.set_major_locator(ticker.MaxNLocator(nbins=6))
        text = {"bytes": bytes_text, "FLOPs": count_text, "parameters": count_text}.get(chart.x)
        if text is not None or chart.x == "milliseconds":
            axes.set_xlim(left=0)
        if text is not None:
            axes.xaxis.set_major_formatter(lambda v, _: text(v).replace(".00 ", " ").replace(".0 ", " "))
    if chart.y_range is not None:
        axes.set_ylim(*chart.y_range)
    axes.set_xlabel(chart.x)
    axes.set_ylabel(chart.y)
    return figure, elements


def _look(series: Series, at: int, looks: Mapping[str, Look]) -> tuple[str, str]:
    if series.pattern in looks:
        return looks[series.pattern].light, looks[series.pattern].marker
    plain = [look.light for name, look in looks.items() if name != "dense"] or [INK]
    return plain[at % len(plain)], CYCLE[at % len(CYCLE)]


def _legend(chart: Chart, looks: Mapping[str, Look]) -> tuple[list[Any], list[str]]:
    """A handle for each pattern, or for each series that has none."""
    line = require("matplotlib.lines", "drawing figures").Line2D
    labels: dict[str, tuple[str, str]] = {}
    for i, series in enumerate(chart.series):
        labels.setdefault(series.pattern or series.label, _look(series, i, looks))
    return [line([], [], color=c, marker=m, markersize=6, linestyle="none") for c, m in labels.values()], list(labels)


def inline_svg(chart: Chart, looks: Mapping[str, Look], prefix: str, limits: Limits | None = None) -> str:
    """A chart as an element of a page.

    Its colours are the page's variables (``--ink``, ``--grid``, ``--paper``, ``--pattern-0`` …), its texts are texts,
    and each of its marks says what it is, can be reached with the keyboard and names its pattern and network.

    Args:
        chart: What is drawn.
        looks: Of all patterns of the page.
        prefix: Of all its elements' ids.
        limits: Wider limits, where it is compared.
    """
    buffer = io.StringIO()
    with _settings(**{"svg.fonttype": "none"}):
        figure, elements = _draw(chart, looks, limits)
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    root = ElementTree.fromstring(buffer.getvalue())
    _plain_names(root)
    for child in list(root):
        if child.tag == "metadata" or (child.tag == "defs" and child.find("style") is not None):
            root.remove(child)
    for key in ("width", "height", "version"):
        root.attrib.pop(key, None)
    root.attrib |= {"role": "group", "aria-roledescription": "chart", "aria-label": f"{chart.title}. {chart.summary}"}
    _prefix_ids(root, prefix)
    _explain(root, chart, elements, prefix)
    return _coloured(ElementTree.tostring(root, encoding="unicode"), looks)


def _plain_names(root: Any) -> None:
    """Names without their namespaces, as pages have them."""
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        for key in [k for k in element.attrib if k.startswith("{")]:
            element.attrib[key.rpartition("}")[2]] = element.attrib.pop(key)


def _prefix_ids(root: Any, prefix: str) -> None:
    for element in root.iter():
        for key, value in element.attrib.items():
            if key == "id":
                element.attrib[key] = f"{prefix}-{value}"
            elif key == "href":
                element.attrib[key] = f"#{prefix}-{value[1:]}"
            elif "url(#" in value:
                element.attrib[key] = value.replace("url(#", f"url(#{prefix}-")


def _explain(root: Any, chart: Chart, elements: Mapping[str, tuple[int, int]], prefix: str) -> None:
    """Give marks their description, a place in the keyboard's order and a larger target; hide all else from readers."""
    named = {f"{prefix}-{key}": at for key, at in elements.items()}
    parents = {child: parent for parent in root.iter() for child in parent}
    loud: set[Any] = set()
    first = True
    for element in root.iter("g"):
        at = named.get(element.attrib.get("id", ""))
        if at is None:
            continue
        series = chart.series[at[0]]
        network = series.network if at[1] < 0 else series.network_of(at[1])
        element.attrib |= {"data-pattern": series.pattern} if series.pattern else {}
        element.attrib |= {"data-network": network} if network else {}
        if at[1] < 0:
            element.attrib["class"] = "line"
            continue
        description = series.marks[at[1]].description
        element.attrib |= {
            "class": "mark",
            "role": "img",
            "aria-label": description.replace("\n", ", "),
            "data-told": description,
            "tabindex": "0" if first else "-1",
        }
        first = False
        for use in element.iter("use"):
            spot = {"class": "spot", "cx": use.attrib["x"], "cy": use.attrib["y"], "r": "11"}
            ElementTree.SubElement(element, "circle", spot)
        while element is not None:
            loud.add(element)
            element = parents.get(element)
    for element in [*loud]:
        if element.attrib.get("class") == "mark":
            continue
        for child in element:
            if child not in loud:
                child.attrib["aria-hidden"] = "true"


def _coloured(svg: str, looks: Mapping[str, Look]) -> str:
    names = {look.light: f"var(--pattern-{i})" for i, look in enumerate(looks.values())}
    names |= {INK: "var(--ink)", GRID: "var(--grid)", PAPER: "var(--paper)"}
    return re.sub("|".join(names), lambda m: names[m[0]], svg)
