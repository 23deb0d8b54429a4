"""The page's sections on masks: sparsity by layer, overlap, and layers that are not pruned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from ..utils.grouping import grouped
from ..utils.layer_names import folded, pattern_of, short
from .run import RunReport
from .training_charts import rounds_of

__all__ = ["MOST_ROWS", "SparsityMap", "mask_overlap", "sparsity_heat_maps", "sparsity_maps", "unpruned_layers"]

MOST_ROWS = 60
"""Models of more layers are shown by repeated blocks first."""


@dataclass(frozen=True)
class Axis:
    """A row or a column of a heat map.

    Attributes:
        name: Its name.
        above: Text above the name of a column.
        network: The network that it is about, if any; the page's filters read it.
        pattern: The pattern, likewise.
    """

    name: str
    above: str = ""
    network: str = ""
    pattern: str = ""


@dataclass(frozen=True)
class HeatMap:
    """Shares in [0, 1] as a table.

    Attributes:
        caption: What it shows.
        rows: Its rows.
        columns: Its columns.
        values: By row and column; ``None`` for an empty cell.
        tall: Whether the names of the columns are written upwards.
    """

    caption: str
    rows: Sequence[Axis]
    columns: Sequence[Axis]
    values: Sequence[Sequence[float | None]]
    tall: bool = False


@dataclass(frozen=True)
class SparsityHeatMaps:
    """Sparsity by layer of one pattern's networks: the map to show, and one of all layers if that shows means."""

    pattern: str
    shown: HeatMap
    all: HeatMap | None = None


@dataclass(frozen=True)
class MaskOverlap:
    """Of the weights that either of two networks keeps, the share that both keep; in words, and by chance."""

    lines: list[str]
    overlap: HeatMap
    chance: HeatMap


class SparsityMap:
    """Sparsity by layer of one pattern's networks, in the order in which they were made.

    Attributes:
        pattern: The pattern.
        networks: Its networks.
        rounds: In which round each first trained; empty where that is not known.
        layers: Names.
        values: By layer and network.
    """

    def __init__(self, report: RunReport, pattern: str) -> None:
        made, shares = rounds_of(report), report.masks["sparsity"]
        names = [r.name for r in report.networks if r.pattern == pattern and r.name in shares]
        last = max(made.values(), default=0) + 1
        self.pattern = pattern
        self.networks = sorted(names, key=lambda n: made.get(n, last))
        self.rounds = [f"round {made[n]}" if n in made else "" for n in self.networks]
        self.layers = [short(str(layer["name"])) for layer in report.masks["layers"]]
        self.values: list[list[float | None]] = [[shares[n][i] for n in self.networks] for i in range(len(self.layers))]

    def by_block(self) -> tuple[list[str], list[list[float | None]]]:
        """Means over the layers of repeated blocks."""
        names, means = [], []
        for block in grouped((pattern_of(name), i) for i, name in enumerate(self.layers)).values():
            many = f" ({len(block)})" if len(block) > 1 else ""
            names.append(", ".join(folded(self.layers[i] for i in block)) + many)
            means.append([_mean(column) for column in zip(*(self.values[i] for i in block), strict=True)])
        return names, means


def sparsity_maps(report: RunReport) -> list[SparsityMap]:
    """One for each pattern."""
    if not report.masks:
        return []
    patterns = dict.fromkeys(r.pattern for r in report.networks if r.name in report.masks["sparsity"])
    return [SparsityMap(report, p) for p in patterns]


def sparsity_heat_maps(report: RunReport) -> list[SparsityHeatMaps]:
    """A heat map for each pattern; none if the run recorded no masks."""
    maps = []
    for found in sparsity_maps(report):
        columns = [
            Axis(name.partition("@")[2] or name, above, network=name)
            for name, above in zip(found.networks, found.rounds, strict=True)
        ]
        caption = (
            f"{found.pattern}: zeros of each layer's weight, %, removed channels included; a column for each network"
        )
        layers = HeatMap(caption, [Axis(name) for name in found.layers], columns, found.values)
        if len(found.layers) <= MOST_ROWS:
            maps.append(SparsityHeatMaps(found.pattern, layers))
            continue
        names, means = found.by_block()
        blocks = HeatMap(f"{caption}; means over repeated blocks", [Axis(name) for name in names], columns, means)
        maps.append(SparsityHeatMaps(found.pattern, blocks, layers))
    return maps


def mask_overlap(report: RunReport) -> MaskOverlap | None:
    """The overlap of all networks' masks; ``None`` if the run recorded no masks."""
    if not report.masks or not report.masks["names"]:
        return None
    patterns = {r.name: r.pattern for r in report.networks}
    axes = [Axis(n, network=n, pattern=patterns.get(n, "")) for n in report.masks["names"]]
    return MaskOverlap(
        between_patterns(report),
        HeatMap("Overlap of kept weights, %", axes, axes, report.masks["overlap"], tall=True),
        HeatMap("Overlap by chance, %", axes, axes, report.masks["chance"], tall=True),
    )


def between_patterns(report: RunReport) -> list[str]:
    """Mean overlap between each two patterns, beside chance's, in words."""
    by_name = {r.name: r.pattern for r in report.networks}
    overlap, chance = report.masks["overlap"], report.masks["chance"]
    patterns = enumerate(by_name.get(name, "") for name in report.masks["names"])
    pairs = grouped(((a, b), (overlap[i][j], chance[i][j])) for (i, a), (j, b) in combinations(patterns, 2))
    out = []
    for (a, b), of in pairs.items():
        mean, by_chance = (sum(values) / len(of) for values in zip(*of, strict=True))
        who = f"{a} with {b}" if a != b else f"{a} among themselves"
        out.append(f"{who}: {100 * mean:.0f} % on average, {100 * by_chance:.0f} % by chance")
    return out


def unpruned_layers(report: RunReport) -> list[tuple[str, str, str]] | None:
    """What no pattern may prune, of which layers, and why; ``None`` if the run did not record it."""
    if not report.kept and not report.masks:
        return None
    reasons = grouped(((entry["what"], entry["reason"]), short(entry["where"])) for entry in report.kept)
    words = {"weights": "its weights (unstructured, N:M)", "channels": "its output channels"}
    return [
        (words.get(what, what), ", ".join(folded(filter(None, where))) or "the whole model", reason)
        for (what, reason), where in reasons.items()
    ]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else None
