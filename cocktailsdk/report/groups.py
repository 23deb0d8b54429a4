"""Channel groups in a few lines each, and answers to "why"."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from ..inspection import ChannelGroup, Inspection, Slice, Why
from ..utils.grouping import grouped
from ..utils.layer_names import folded, owner, pattern_of, short
from .inspection import heading
from .numbers import count_text, flops_text

__all__ = ["groups_view", "why_view"]

STATISTICS = ("running_mean", "running_var")

PLURALS = {"row": "rows", "entry": "entries", "column": "columns"}


def groups_view(found: Inspection, groups: Sequence[ChannelGroup], reference: str) -> RenderableType:
    """Each group in a few lines; groups of repeated blocks once."""
    of = f"{len(groups)} of {len(found.groups)}" if len(groups) < len(found.groups) else str(len(groups))
    parts = heading(found, reference, f"{of} channel groups; a unit goes or stays as one, wherever it occurs")
    parts.append(Text())
    for alike in _alike(groups):
        parts += [_heading(alike), Padding(_details(found, alike), (0, 0, 1, 2))]
    if not groups:
        reason = f": {found.kept[0].reason}" if found.kept else ""
        parts.append(Text(f"No channels of {found.model} can go{reason}"))
    return Group(*parts)


def why_view(answers: Iterable[Why]) -> RenderableType:
    """The answers, one after the other."""
    return Group(*(Text(str(answer)) for answer in answers))


def _alike(groups: Iterable[ChannelGroup]) -> list[list[ChannelGroup]]:
    """Groups of repeated blocks, together."""

    def common(g: ChannelGroup) -> Hashable:
        slices = frozenset((pattern_of(s.tensor), s.kind, s.per_unit, s.of, s.stay) for s in g.slices)
        return pattern_of(g.name), g.units, g.kind, g.unit, len(g.rows), slices

    return [*grouped((common(g), g) for g in groups).values()]


def _heading(alike: Sequence[ChannelGroup]) -> Text:
    g = alike[0]
    size = f"{g.units} channels" if g.unit == "a channel" else f"{g.units} units; a unit is {g.unit}"
    many = f"{len(alike)} groups of " if len(alike) > 1 else ""
    kind = "" if g.kind == "channels" else f"{g.kind}: "
    return Text.assemble((", ".join(folded(a.name for a in alike)), "bold"), f": {kind}{many}{size}")


def _details(found: Inspection, alike: Sequence[ChannelGroup]) -> RenderableType:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(overflow="fold")
    one = f"one unit of {alike[0].name}" if len(alike) == 1 else "one unit of one of them"
    slices = [s for g in alike for s in g.slices]
    rows, columns = ([s for s in slices if s.kind == kind] for kind in ("rows", "columns"))
    for count, text in [*_by_count(rows, "row"), *_entries(slices), *_by_count(columns, "column")]:
        table.add_row(count, text)
    layers = len(alike[0].rows)
    makers = "one layer" if layers == 1 else f"{layers} layers"
    below = [_saved(alike), *_staying(found, alike)]
    return Group(Text(f"made by {makers}; removing {one} removes"), table, *map(Text, below))


def _counted(n: int, what: str) -> str:
    return f"{n} {what if n == 1 else PLURALS[what]}"


def _by_count(slices: Iterable[Slice], what: str) -> list[tuple[str, str]]:
    counts = sorted(grouped((s.per_unit, short(s.tensor)) for s in slices).items(), reverse=True)
    return [(_counted(n, what), f"of {', '.join(folded(names))}") for n, names in counts]


def _entries(slices: Sequence[Slice]) -> list[tuple[str, str]]:
    """Biases of the layers that lose rows, norms, and the rest, in this order."""
    makers = {owner(s.tensor) for s in slices if s.kind == "rows"}
    biases: dict[int, list[str]] = {}
    norms: dict[tuple[int, str], dict[str, list[str]]] = {}
    others = []
    for s in slices:
        if s.kind != "entries":
            continue
        module, _, part = s.tensor.rpartition(".")
        if part == "bias" and module in makers:
            biases.setdefault(s.per_unit, []).append(module)
        elif "Norm" in s.module or part in STATISTICS:
            norms.setdefault((s.per_unit, s.module), {}).setdefault(module, []).append(part)
        else:
            others.append(s)
    out = [
        (_counted(n, "entry"), f"of the bias{'es' if len(m) > 1 else ''} of {', '.join(folded(m))}")
        for n, m in sorted(biases.items(), reverse=True)
    ]
    for (n, kind), modules in norms.items():
        parts = grouped((_parts(names), module) for module, names in modules.items())
        out += [
            (_counted(n, "entry"), f"of the norm{'s' if len(m) > 1 else ''} {', '.join(folded(m))} ({kind}: {p})")
            for p, m in parts.items()
        ]
    return out + _by_count(others, "entry")


def _parts(names: Sequence[str]) -> str:
    """``weight, bias, statistics``."""
    named = [p for p in names if p not in STATISTICS]
    return ", ".join([*named, "statistics"] if len(named) < len(names) else named)


def _saved(alike: Sequence[ChannelGroup]) -> str:
    params = _range([count_text(n) for n in sorted({g.params for g in alike})])
    flops = _range([flops_text(n) for n in sorted({g.flops for g in alike})])
    return f"and saves {params} parameters and {flops}"


def _range(texts: Sequence[str]) -> str:
    """``4.01 to 5.22 MFLOPs``."""
    low, high = texts[0], texts[-1]
    if low == high:
        return low
    number, _, unit = low.partition(" ")
    return f"{number} to {high}" if high.endswith(unit) else f"{low} to {high}"


def _staying(found: Inspection, alike: Sequence[ChannelGroup]) -> list[str]:
    """What stays of the weights' rows and columns that are touched, and why."""
    reasons = {(s.tensor, s.axis): s.reason for s in found.stays}
    touched = (s for g in alike for s in g.slices if s.stay and s.kind != "entries")
    parts = grouped(((s.stay, s.of, s.kind, reasons.get((s.tensor, s.axes[0]), "")), short(s.tensor)) for s in touched)
    return [
        f"{stay} of the {of} {kind} of {', '.join(folded(names))} stay: {reason}"
        for (stay, of, kind, reason), names in parts.items()
    ]
