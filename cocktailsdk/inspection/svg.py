"""The coupling as SVG."""

from __future__ import annotations

from xml.sax.saxutils import escape

from ..utils.layer_names import few
from .findings import ChannelGroup, Findings
from .lanes import Fold, Lane, Row, arranged

__all__ = ["draw"]

COLOURS = ("#4269d0", "#e8710a", "#2a9d61", "#c2328a", "#0b8fa3", "#9c6b1e", "#7a5cc7", "#d1495b", "#5b8c1f", "#2f6f9f")
"""Lanes take them in turn; they differ in lightness too."""

GREY, INK, FAINT, PAPER = "#9a9a9a", "#1f2328", "#6e7781", "#ffffff"

ROW, COLUMN, LEFT, TOP = 24, 22, 28, 92
CHARACTER = 6.7
"""Width of a character of the drawing's font at 11 px."""

LISTED = 4
"""Groups that a tooltip names."""

STYLE = (
    "text{font:11px ui-monospace,SFMono-Regular,Menlo,Consolas,'DejaVu Sans Mono',monospace;fill:#1f2328}"
    ".title{font-size:15px;font-weight:600}.faint{fill:#6e7781}.label{font-weight:600}"
)


def draw(found: Findings, title: str) -> str:
    """The picture of an inspection; the same for the same model, byte by byte."""
    rows, lanes, folds = arranged(found)
    by_key = {lane.key: lane for lane in lanes}
    columns = 1 + max((lane.column for lane in lanes), default=0)
    names = LEFT + columns * COLUMN + 14 + (40 if folds else 0)
    shapes = names + CHARACTER * max([len(r.name) for r in rows], default=0) + 18
    labels = shapes + CHARACTER * max([len(_shape(r)) for r in rows], default=0) + 18
    labels_of_rows = [_label(row, i, by_key) for i, row in enumerate(rows)]
    width = round(max(labels + CHARACTER * max([len(t) for t, _ in labels_of_rows], default=0) + 24, 640))
    height = TOP + ROW * max(len(rows), 1) + 20
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" font-size="11">',
        f"<title>{escape(title)}: which channels go together</title>",
        f"<style>{STYLE}</style>",
        f'<rect width="{width}" height="{height}" rx="6" fill="{PAPER}"/>',
        *_head(found, title),
        *(_stripe(i, width) for i in range(0, len(rows), 2)),
        *(part for fold in folds for part in _bracket(fold, names)),
        *(_line(lane, _colour(lane, i)) for i, lane in enumerate(lanes)),
    ]
    colours = {lane.key: _colour(lane, i) for i, lane in enumerate(lanes)}
    for i, row in enumerate(rows):
        text, key = labels_of_rows[i]
        out += _row(row, i, by_key, colours, (names, shapes, labels), (text, colours.get(key, GREY)))
    out.append("</svg>")
    return "\n".join(out) + "\n"


def _head(found: Findings, title: str) -> list[str]:
    units = sum(g.units for g in found.groups)
    line = f"{len(found.groups)} channel groups, {units} units; rows are layers in order of execution"
    if not found.followed:
        line = "its graph is not known: everything is kept whole"
    y = 66
    return [
        f'<text class="title" x="{LEFT - 8}" y="28">{escape(title)}</text>',
        f'<text class="faint" x="{LEFT - 8}" y="46">{escape(line)}</text>',
        f'<circle cx="{LEFT - 3}" cy="{y}" r="5" fill="{COLOURS[0]}"/>',
        f'<text x="{LEFT + 8}" y="{y + 4}">makes its channels</text>',
        f'<circle cx="{LEFT + 154}" cy="{y}" r="4.2" fill="{PAPER}" stroke="{COLOURS[0]}" stroke-width="2"/>',
        f'<text x="{LEFT + 164}" y="{y + 4}">reads them</text>',
        f'<rect x="{LEFT + 255}" y="{y - 4.5}" width="9" height="9" fill="{GREY}"/>',
        f'<text x="{LEFT + 270}" y="{y + 4}">kept (the tooltip says why)</text>',
    ]


def _x(lane: Lane) -> int:
    return LEFT + lane.column * COLUMN


def _y(row: int) -> int:
    return TOP + row * ROW + ROW // 2


def _colour(lane: Lane, order: int) -> str:
    return GREY if lane.group is None else COLOURS[order % len(COLOURS)]


def _stripe(row: int, width: int) -> str:
    return f'<rect x="8" y="{TOP + row * ROW}" width="{width - 16}" height="{ROW}" rx="3" fill="#f6f8fa"/>'


def _bracket(fold: Fold, names: float) -> list[str]:
    """A bracket before the names of repeated rows, with how often they occur."""
    x, top, bottom = names - 12, TOP + fold.start * ROW + 4, TOP + fold.stop * ROW - 4
    middle = (top + bottom) / 2 + 4
    return [
        f'<path d="M{x:g} {top} h-5 V{bottom} h5" fill="none" stroke="{FAINT}" stroke-width="1.2"/>',
        f'<text class="faint" x="{x - 9:g}" y="{middle:g}" text-anchor="end">×{fold.times}</text>',
    ]


def _line(lane: Lane, colour: str) -> str:
    x, width = _x(lane), 2 if lane.group is None or lane.group.kind != "residual stream" else 4
    title = escape(_lane_title(lane))
    if lane.first == lane.last:
        return f"<g><title>{title}</title></g>"
    return (
        f'<path d="M{x} {_y(lane.first)} V{_y(lane.last)}" stroke="{colour}" stroke-width="{width}" '
        f'stroke-linecap="round" opacity="0.85"><title>{title}</title></path>'
    )


def _lane_title(lane: Lane) -> str:
    if lane.group is None:
        return f"kept: {lane.reason}"
    g = lane.group
    many = f" ({lane.times} groups like it)" if lane.times > 1 else ""
    return f"{g.name}: {g.units} units, {g.unit} each{many}"


def _shape(row: Row) -> str:
    return "×".join(map(str, row.shape))


def _label(row: Row, at: int, lanes: dict[str, Lane]) -> tuple[str, str]:
    """What stands beside the first row of a lane, and the lane whose colour it has."""
    for key in row.makes:
        lane = lanes[key]
        if lane.group is not None and at == lane.first:
            return _size(lane.group), key
    return (f"kept: {row.kept}", "") if row.kept else ("", "")


def _size(g: ChannelGroup) -> str:
    """``residual stream: 256 channels``, ``12 attention heads``."""
    if g.kind not in ("channels", "residual stream"):
        return f"{g.units} {g.kind}"
    many = f"{g.units} channels" if g.channels == 1 else f"{g.units} units of {g.channels} channels"
    return many if g.kind == "channels" else f"{g.kind}: {many}"


def _row(
    row: Row,
    at: int,
    lanes: dict[str, Lane],
    colours: dict[str, str],
    places: tuple[float, float, float],
    label: tuple[str, str],
) -> list[str]:
    y, (names, shapes, labels) = _y(at), places
    touched = [_x(lanes[key]) for key in (*row.makes, *row.reads)]
    out = [f"<g><title>{escape(_tooltip(row))}</title>"]
    if len(set(touched)) > 1:
        out.append(f'<path d="M{min(touched)} {y} H{max(touched)}" stroke="{FAINT}" stroke-width="1.2"/>')
    out += [
        f'<circle cx="{_x(lanes[key])}" cy="{y}" r="4.2" fill="{PAPER}" stroke="{colours[key]}" stroke-width="2"/>'
        for key in row.reads
    ]
    for key in row.makes:
        x = _x(lanes[key])
        if lanes[key].group is None:
            out.append(f'<rect x="{x - 4.5}" y="{y - 4.5}" width="9" height="9" fill="{GREY}"/>')
        else:
            out.append(f'<circle cx="{x}" cy="{y}" r="5" fill="{colours[key]}"/>')
    if row.kept and not row.makes:
        out.append(f'<rect x="{LEFT - 4.5}" y="{y - 4.5}" width="9" height="9" fill="{GREY}"/>')
    out.append(f'<text x="{names:g}" y="{y + 4}">{escape(row.name)}</text>')
    out.append(f'<text class="faint" x="{shapes:g}" y="{y + 4}">{_shape(row)}</text>')
    if label[0]:
        weight = "faint" if label[1] == GREY else "label"
        fill = "" if label[1] == GREY else f' style="fill:{label[1]}"'
        out.append(f'<text class="{weight}" x="{labels:g}" y="{y + 4}"{fill}>{escape(label[0])}</text>')
    out.append("</g>")
    return out


def _tooltip(row: Row) -> str:
    lines = [row.name]
    makes, reads = ([k for k in keys if not k.startswith("stays: ")] for keys in (row.makes, row.reads))
    if makes:
        lines.append(f"makes the channels of {few(makes, LISTED)}")
    if reads:
        lines.append(f"reads the channels of {few(reads, LISTED)}")
    if row.kept:
        lines.append(f"kept: {row.kept}")
    if row.layer is not None:
        lines.append(f"{row.layer.params:,} parameters, {row.layer.flops:,} FLOPs")
    return "\n".join(lines)
