"""Parts that pages are made of. All that is given is text, and is escaped here; what is called ``…_html`` is not."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

from ..printable import printable
from .chart import Chart, Table

__all__ = ["chart_table", "details", "escape", "facts", "figure", "heading", "heat_table", "symbol", "table_html"]

SHAPES = {
    "o": '<circle cx="7" cy="7" r="5"/>',
    "s": '<rect x="2.5" y="2.5" width="9" height="9"/>',
    "^": '<path d="M7 1.5 12.5 12h-11z"/>',
    "v": '<path d="M7 12.5 1.5 2h11z"/>',
    "D": '<path d="M7 1 13 7 7 13 1 7z"/>',
    "P": '<path d="M5 1h4v4h4v4H9v4H5V9H1V5h4z"/>',
    "X": '<path d="m3.5 1 3.5 3.5L10.5 1 13 3.5 9.5 7 13 10.5 10.5 13 7 9.5 3.5 13 1 10.5 4.5 7 1 3.5z"/>',
    "p": '<path d="m7 1 6 4.5-2.3 7.5H3.300L1 5.5z"/>',
    "h": '<path d="m7 1 5.200 3v6L7 13l-5.200-3V4z"/>',
}
"""Of matplotlib's markers, 14 pixels wide."""


def escape(text: str) -> str:
    """A text in a page: neither tags nor control and direction characters."""
    return html.escape(printable(text))


def heading(level: int, text: str, name: str = "") -> str:
    """A heading, with an id where it is linked to."""
    return f"<h{level}{f' id={name!r}' if name else ''}>{escape(text)}</h{level}>"


def facts(told: Mapping[str, str]) -> str:
    """Few figures, large."""
    inner = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in told.items())
    return f'<dl class="facts">{inner}</dl>'


def symbol(marker: str, number: int) -> str:
    """A pattern's marker in its colour."""
    shape = SHAPES.get(marker, SHAPES["o"])
    return f'<svg viewBox="0 0 14 14" aria-hidden="true" style="fill: var(--pattern-{number})">{shape}</svg>'


def details(summary: str, inner_html: str) -> str:
    """What is shown when it is asked for."""
    return f"<details><summary>{escape(summary)}</summary>{inner_html}</details>"


def figure(title: str, svg_html: str, summary: str, table: str) -> str:
    """A chart, what it shows in words, and its table behind it."""
    return (
        f"<figure>{heading(3, title)}{svg_html}<figcaption>{escape(summary)}</figcaption>"
        f"{details('The same as a table', table)}</figure>"
    )


def chart_table(chart: Chart) -> str:
    """A chart's table."""
    return table_html(chart.table, chart.title)


def table_html(table: Table, caption: str) -> str:
    """A table that scrolls by itself where it is wider than the page."""
    head = "".join(f'<th scope="col">{escape(c)}</th>' for c in table.columns)
    rows = []
    for i, row in enumerate(table.rows):
        first, *others = row
        cells = "".join(f"<td>{escape(c)}</td>" for c in others)
        marks = attributes(
            pattern=table.patterns[i] if table.patterns else "", network=table.networks[i] if table.networks else ""
        )
        rows.append(f'<tr{marks}><th scope="row">{escape(first)}</th>{cells}</tr>')
    return _scrolled(f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody>", caption)


def attributes(**data: str) -> str:
    """`` data-pattern="channel"``, of those that are not empty."""
    return "".join(f' data-{k}="{escape(v)}"' for k, v in data.items() if v)


def heat_table(
    caption: str,
    rows: Sequence[str],
    columns: Sequence[tuple[str, str]],
    values: Sequence[Sequence[float | None]],
    marks: Sequence[str] = (),
    row_marks: Sequence[str] = (),
    tall: bool = False,
) -> str:
    """Shares in [0, 1] as a table of percentages, each on a colour that says the same.

    Args:
        caption: What it shows.
        rows: Names.
        columns: Names, and what stands above them.
        values: By row; ``None`` for nothing.
        marks: Of each column its attributes, as :func:`attributes` makes them.
        row_marks: Of each row likewise.
        tall: Whether the columns' names are written upwards.
    """
    marks = marks or [""] * len(columns)
    above = "".join(f"<th{m}>{escape(a)}</th>" for (_, a), m in zip(columns, marks, strict=True))
    head = f"<tr><td></td>{above}</tr>" if any(a for _, a in columns) else ""
    head += "<tr><td></td>" + "".join(
        f'<th scope="col"{m}>{escape(c)}</th>' for (c, _), m in zip(columns, marks, strict=True)
    )
    body = []
    for i, (name, row) in enumerate(zip(rows, values, strict=True)):
        cells = "".join(_cell(v, m) for v, m in zip(row, marks, strict=True))
        body.append(f'<tr{row_marks[i] if row_marks else ""}><th scope="row">{escape(name)}</th>{cells}</tr>')
    return _scrolled(
        f"<thead>{head}</tr></thead><tbody>{''.join(body)}</tbody>", caption, "heat tall" if tall else "heat"
    )


def _cell(value: float | None, mark: str) -> str:
    if value is None:
        return f'<td class="none"{mark}>–</td>'
    deep = ' class="deep"' if value > 0.5 else ""
    return f'<td{deep}{mark} style="--v:{value:.3g}">{100 * value:.0f}</td>'


def _scrolled(inner_html: str, caption: str, kind: str = "") -> str:
    of = f' class="{kind}"' if kind else ""
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(caption)}">'
        f"<table{of}><caption><span>{escape(caption)}</span></caption>{inner_html}</table></div>"
    )
