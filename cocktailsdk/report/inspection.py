"""An inspection, readable at 80 columns."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import TypeVar

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ..inspection import ChannelGroup, Inspection, Layer, Saving
from ..utils.grouping import grouped
from ..utils.layer_names import few, folded, pattern_of, short
from .numbers import count_text, flops_text, percent_text, shape_text
from .tables import STYLES, plain_table

__all__ = ["heading", "inspection_view"]

T = TypeVar("T")

RANGE = re.compile(r"\{([^}]*)\}")
NUMBERS = re.compile(r"\d[\d,-]*")

LAYERS = "Layers (N:M: which M divide the input channels; in brackets: not all of them)"
GROUPS = "Channel groups (units go or stay as one, wherever they occur)"

SAVINGS = "What each pattern leaves when half of what it may touch is gone"

UNPROVEN = "built without values: that all groups can be slimmed is proven only when they are"
"""Told of models on the meta device."""

LONGEST_NAME = 24
"""Where a name is longer than this, the names of a block are printed under the block's."""

NAMES_SHOWN = 3
"""Of a long list of names so many are printed; ``--json`` has all."""


MOST_LAYERS = 60
"""Of models with more layers, those of repeated blocks are shown once."""

REPEATED = "Layers and groups of repeated blocks are shown once, with what one of them has; --full shows all"


def inspection_view(found: Inspection, reference: str, *, full: bool = False) -> RenderableType:
    """Layers, channel groups, what is kept whole and why, and what each pattern could save.

    Args:
        found: The inspection.
        reference: What the model was called.
        full: Whether every layer of a large model is shown, instead of repeated blocks once.
    """
    parts = heading(found, reference, f"on {', '.join(found.inputs) or 'no inputs'}")
    once = len(found.layers) > MOST_LAYERS and not full
    if once:
        parts.append(Text(REPEATED, style="dim"))
    parts.append(Text())
    groups = _alike_groups(found.groups) if once else [[g] for g in found.groups]
    numbers = {g.name: i for i, alike in enumerate(groups, 1) for g in alike}
    layers = _alike_layers(found.layers, numbers) if once else [[layer] for layer in found.layers]
    parts += [_layers(layers, numbers), Text()]
    if groups:
        parts += [_groups(groups, numbers), Text()]
    parts += [*_unpruned(found), Text()]
    if found.savings:
        parts += [_savings(found), Text()]
    parts.append(_sum_line(found))
    return Group(*parts)


def heading(found: Inspection, reference: str, line: str) -> list[RenderableType]:
    """The model in a line, another line below it, and whether what follows is proven."""
    size = f"{count_text(found.params)} parameters, {flops_text(found.flops)}"
    title = Text.assemble((reference, "bold"), f" ({found.model}), {size}")
    unproven = [UNPROVEN] if found.followed and not found.proven else []
    return [title, *(Text(text, style="dim") for text in (line, *unproven))]


def _alike_groups(groups: Iterable[ChannelGroup]) -> list[list[ChannelGroup]]:
    """Groups of repeated blocks, together."""

    def common(g: ChannelGroup) -> Hashable:
        return pattern_of(g.name), g.units, g.channels, g.kind, len(g.rows), len(g.entries), len(g.columns)

    return [*grouped((common(g), g) for g in groups).values()]


def _alike_layers(layers: Iterable[Layer], numbers: dict[str, int]) -> list[list[Layer]]:
    """Layers of repeated blocks of which the same is to be said, together."""

    def common(layer: Layer) -> Hashable:
        may = (layer.unstructured.eligible, layer.nm.eligible, tuple(layer.coverage.items()))
        together = tuple(numbers[g] for g in layer.groups)
        return pattern_of(layer.module or layer.name), layer.shape, layer.params, layer.flops, may, together

    return [*grouped((common(layer), layer) for layer in layers).values()]


def _together(names: Iterable[str]) -> str:
    """Names of repeated blocks as one: ``blocks.0-11.attn.qkv``."""
    return ", ".join(RANGE.sub(lambda m: m[1].replace("..", "-"), name) for name in folded(names))


def _layers(layers: Iterable[list[Layer]], numbers: dict[str, int]) -> RenderableType:
    table = plain_table("layer", "weight", "params", "FLOPs", "unstr.", "N:M", "group", right=(2, 3, 6), title=LAYERS)
    rows = list(layers)
    names = [_together(layer.module or layer.name for layer in alike) for alike in rows]
    for label, (layer, *_) in _indented(names, rows, table):
        runs = " ".join(str(m) for m, share in layer.coverage.items() if share == 1.0)
        partly = " ".join(f"({m})" for m, share in layer.coverage.items() if 0.0 < share < 1.0)
        table.add_row(
            label,
            shape_text(layer.shape),
            count_text(layer.params),
            count_text(layer.flops),
            "yes" if layer.unstructured.eligible else Text("no", style="dim"),
            f"{runs} {partly}".strip() if layer.nm.eligible else Text("no", style="dim"),
            ", ".join(str(numbers[g]) for g in layer.groups) or Text("kept", style="dim"),
        )
    return table


def _groups(groups: Sequence[list[ChannelGroup]], numbers: dict[str, int]) -> RenderableType:
    table = plain_table("#", "channel group", "units", "made by", "entries", "read by", right=(0, 2, 4), title=GROUPS)
    names = [_together(g.name for g in alike) for alike in groups]
    for label, (g, *_) in _indented(names, groups, table, column=1):
        units = f"{g.units}" if g.channels == 1 else f"{g.units}x{g.channels}"
        makers = f"{len(g.rows)} layers" if len(g.rows) > 1 else few(map(short, g.rows), 1).replace(g.name, "itself")
        block = g.name.removesuffix(label.strip()) if label != g.name else ""
        readers = few((short(c).removeprefix(block) for c in g.columns), 2 if block else NAMES_SHOWN)
        table.add_row(str(numbers[g.name]), label, units, makers, f"{len(g.entries)}", readers)
    return table


def _unpruned(found: Inspection) -> list[RenderableType]:
    """Reasons, each once, with what they keep."""
    kept: list[tuple[str, str]] = []
    for layer in found.layers if found.followed else ():
        if not layer.unstructured.eligible:
            kept.append((f"not unstructured or N:M: {layer.unstructured.reason}", layer.module))
        elif not layer.nm.eligible:
            kept.append((f"not N:M: {layer.nm.reason}", layer.module))
    kept += [(f"channels: {k.reason}" if k.where else k.reason, short(k.where)) for k in found.kept]
    reasons = grouped(kept)
    lines: list[RenderableType] = [Text("Kept whole", style="bold")]
    for same in grouped((pattern_of(reason), reason) for reason in reasons).values():
        names = folded(w for reason in same for w in reasons[reason] if w)
        common = ", ".join(folded(same))
        lines.append(Text(f"{few(names, NAMES_SHOWN)}: {common}" if names else common))
    if not reasons:
        lines.append(Text("nothing"))
    return lines


def _savings(found: Inspection) -> RenderableType:
    table = plain_table(
        "network", "may touch", "params left", "FLOPs left", "non-zero FLOPs", right=range(1, 5), title=SAVINGS
    )
    for s in found.savings:
        table.add_row(
            Text(s.subnet, style=STYLES.get(s.pattern, "")),
            percent_text(s.coverage),
            _remaining(s.params, found.params),
            _remaining(s.flops, found.flops),
            _remaining(s.nonzero_flops, found.flops),
        )
    return table


def _remaining(value: int, total: int) -> str:
    return f"{count_text(value)} ({percent_text(value / total, 0)})" if total else count_text(value)


def _sum_line(found: Inspection) -> Text:
    head = f"Sum: {count_text(found.params)} parameters, {flops_text(found.flops)}"
    by: dict[str, Saving] = {s.subnet: s for s in found.savings}
    if not by or not found.flops:
        return Text(f"{head}; nothing that can be saved is known.", style="bold")
    zeros, runs, channel = by["unstructured@0.5"], by["2:4"], by["channel@0.5"]
    return Text(
        f"{head}. At half, unstructured zeros {percent_text(1 - zeros.params / found.params, 0)} of the parameters, "
        f"2:4 zeros {percent_text(1 - runs.params / found.params, 0)} (both: fewer bytes, no speed without special "
        f"kernels), and channel removes {percent_text(1 - channel.params / found.params, 0)} of the parameters and "
        f"{percent_text(1 - channel.flops / found.flops, 0)} of the FLOPs.",
        style="bold",
    )


def _indented(names: Sequence[str], items: Iterable[T], table: Table, column: int = 0) -> Iterator[tuple[str, T]]:
    """Items with what to call them: their names, or where these are long, their names within a block under its heading.

    Headings are rows of the table, made as the items come. A block is what a path names up to its first number
    (``encoder.layer.0``).
    """
    if max(map(len, names), default=0) <= LONGEST_NAME:
        yield from zip(names, items, strict=True)
        return
    counts = Counter(map(_block, names))
    last = ""
    for name, item in zip(names, items, strict=True):
        block = _block(name)
        if not block or (counts[block] < 2 and len(name) <= LONGEST_NAME):
            last = last if name == last else ""
            yield name, item
            continue
        if block != last:
            table.add_row(*[""] * column, Text(block, style="dim"))
            last = block
        yield f"  {name.removeprefix(block).lstrip('.')}", item


def _block(name: str) -> str:
    parts = name.split(".")
    at = next((i for i, p in enumerate(parts) if NUMBERS.fullmatch(p)), None)
    return "" if at is None or at + 1 == len(parts) else ".".join(parts[: at + 1])
