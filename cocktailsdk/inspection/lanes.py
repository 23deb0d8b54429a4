"""The coupling as rows and lanes, to be drawn: a row for each layer, a lane for each channel group.

A lane reaches from the first to the last row that makes or reads its channels. Lanes that do not overlap share a
column. Rows of repeated blocks are drawn once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

from ..graph import Stay
from ..utils.layer_names import folded, pattern_of, short
from .findings import ChannelGroup, Findings, Layer

__all__ = ["Fold", "Lane", "Row", "arranged"]

LONGEST_BLOCK = 64
"""Rows of the longest repeated block that is looked for."""


@dataclass(frozen=True)
class Row:
    """A weight.

    Attributes:
        name: What it is called; of repeated blocks all of them.
        tensor: The parameter.
        shape: Its shape.
        layer: Counts and roles; ``None`` for embeddings.
        makes: Keys of the lanes whose channels it makes.
        reads: Keys of the lanes whose channels it reads.
        kept: Why some or all of its output channels stay; empty where all may go.
    """

    name: str
    tensor: str
    shape: tuple[int, ...]
    layer: Layer | None
    makes: tuple[str, ...]
    reads: tuple[str, ...]
    kept: str


@dataclass(frozen=True)
class Fold:
    """Rows that stand for more of their kind.

    Attributes:
        start: First row.
        stop: One past the last.
        times: How many times they occur.
    """

    start: int
    stop: int
    times: int


@dataclass
class Lane:
    """A channel group, or channels that stay together.

    Attributes:
        key: Unique.
        group: The group; ``None`` for what stays.
        reason: Why, for what stays.
        times: For a lane of repeated rows, how many groups it stands for.
        first: First row that it touches.
        last: Last row.
        column: Where it is drawn, from the left.
    """

    key: str
    group: ChannelGroup | None
    reason: str = ""
    times: int = 1
    first: int = -1
    last: int = -1
    column: int = 0
    rows: set[int] = field(default_factory=set)


def arranged(found: Findings) -> tuple[list[Row], list[Lane], list[Fold]]:
    """Rows in order of execution, lanes with their columns, and which rows are repeated."""
    rows, reasons = _rows(found)
    rows, folds, same = _folded(rows)
    groups = {g.name: g for g in found.groups}
    lanes: dict[str, Lane] = {}
    for i, row in enumerate(rows):
        for key in (*row.makes, *row.reads):
            lane = lanes.setdefault(key, Lane(key, groups.get(key), reasons.get(key, "")))
            lane.rows.add(i)
    for key in same.values():
        if key in lanes:
            lanes[key].times += 1
    for lane in lanes.values():
        lane.first, lane.last = min(lane.rows), max(lane.rows)
    _place(lanes.values())
    return rows, sorted(lanes.values(), key=lambda lane: (lane.first, lane.column)), folds


def _rows(found: Findings) -> tuple[list[Row], dict[str, str]]:
    """Every weight and embedding, and the reasons of lanes that stay."""
    stays = {(s.tensor, s.axis): s for s in found.stays}
    layers = {la.name: la for la in found.layers}
    makers = [m for s in found.stays for m in s.makers] + [m for g in found.groups for m in g.rows]
    tables = [m for m in dict.fromkeys(makers) if m not in layers]
    reasons: dict[str, str] = {}
    out = []
    for tensor in [*tables, *layers]:
        layer = layers.get(tensor)
        makes = [g.name for g in found.groups if tensor in g.rows]
        reads = list(layer.reads) if layer is not None else []
        axes = layer.axes if layer is not None and layer.axes else (len(found.tensors.get(tensor, (1, 1))) - 1, -1)
        kept = stays.get((tensor, axes[0]))
        for stay, lanes in ((kept, makes), (stays.get((tensor, axes[1])), reads)):
            if stay is not None and stay.makers:
                key = _family(stay)
                reasons.setdefault(key, stay.reason)
                lanes.append(key)
        name = short(tensor)
        shape = found.tensors.get(tensor, layer.shape if layer is not None else ())
        reason = "" if kept is None else kept.reason
        if not found.followed:
            reason = "the model's graph is not known"
        elif kept is not None and kept.positions < kept.of:
            reason = f"{kept.positions} of {kept.of} channels stay: {kept.reason}"
        out.append(Row(name, tensor, shape, layer, tuple(makes), tuple(reads), reason))
    return out, reasons


def _family(stay: Stay) -> str:
    """One key for all that stays together."""
    return f"stays: {stay.makers[0]} {len(stay.makers)}"


def _folded(rows: Sequence[Row]) -> tuple[list[Row], list[Fold], dict[str, str]]:
    """Repeated rows once, what is repeated, and for each lane that fell away the one that stands for it."""
    first: dict[str, int] = {}
    for i, row in enumerate(rows):
        for key in (*row.makes, *row.reads):
            first.setdefault(key, i)

    def alike(i: int, j: int) -> bool:
        a, b = rows[i], rows[j]
        if pattern_of(a.name) != pattern_of(b.name) or a.shape != b.shape:
            return False
        if pattern_of(a.kept) != pattern_of(b.kept):
            return False
        if (len(a.makes), len(a.reads)) != (len(b.makes), len(b.reads)):
            return False
        pairs = zip((*a.makes, *a.reads), (*b.makes, *b.reads), strict=True)
        return all(x == y or i - first[x] == j - first[y] for x, y in pairs)

    out: list[Row] = []
    folds: list[Fold] = []
    same: dict[str, str] = {}
    i = 0
    while i < len(rows):
        period, times = _repeat(i, len(rows), alike)
        if times < 2:
            out.append(rows[i])
            i += 1
            continue
        start = len(out)
        for j in range(period):
            copies = [rows[i + j + k * period] for k in range(times)]
            for copy in copies[1:]:
                pairs = zip((*copy.makes, *copy.reads), (*copies[0].makes, *copies[0].reads), strict=True)
                same.update({x: y for x, y in pairs if x != y})
            name, kept = (", ".join(folded(texts)) for texts in ([c.name for c in copies], [c.kept for c in copies]))
            out.append(replace(copies[0], name=name, kept=kept))
        folds.append(Fold(start, len(out), times))
        i += period * times

    def standing(keys: Iterable[str]) -> tuple[str, ...]:
        found = []
        for key in keys:
            while key in same:
                key = same[key]
            found.append(key)
        return tuple(dict.fromkeys(found))

    out = [replace(row, makes=standing(row.makes), reads=standing(row.reads)) for row in out]
    return out, folds, same


def _repeat(at: int, n: int, alike: Callable[[int, int], bool]) -> tuple[int, int]:
    """The repetition from a row on that saves most rows: its length and how many times it occurs."""
    best, saved = (1, 1), 0
    for period in range(1, min(LONGEST_BLOCK, (n - at) // 2) + 1):
        run = 0
        while at + period + run < n and alike(at + run, at + period + run):
            run += 1
        times = 1 + run // period
        if period * (times - 1) > saved:
            best, saved = (period, times), period * (times - 1)
    return best


def _place(lanes: Iterable[Lane]) -> None:
    """Longest lanes to the left; each in the first column where it overlaps none."""
    columns: list[list[Lane]] = []
    for lane in sorted(lanes, key=lambda lane: (lane.first - lane.last, lane.first, lane.key)):
        free = (
            at
            for at, column in enumerate(columns)
            if all(lane.first > other.last or lane.last < other.first for other in column)
        )
        lane.column = next(free, len(columns))
        if lane.column == len(columns):
            columns.append([])
        columns[lane.column].append(lane)
