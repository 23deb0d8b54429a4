"""The page's sections on masks: sparsity by layer, overlap, and what is kept whole."""

from __future__ import annotations

from collections.abc import Sequence

from ..inspection.layer_names import folded, pattern_of
from .course_charts import rounds_of
from .html import attributes, details, escape, heat_table
from .run import RunReport

__all__ = ["MOST_ROWS", "SparsityMap", "kept_section", "overlap_section", "sparsity_maps", "sparsity_section"]

MOST_ROWS = 60
"""Models of more layers are shown by repeated blocks first."""


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
        self.layers = [str(layer["name"]).removesuffix(".weight") for layer in report.masks["layers"]]
        self.values: list[list[float | None]] = [[shares[n][i] for n in self.networks] for i in range(len(self.layers))]

    def by_block(self) -> tuple[list[str], list[list[float | None]]]:
        """Means over the layers of repeated blocks."""
        held: dict[str, list[int]] = {}
        for i, name in enumerate(self.layers):
            held.setdefault(pattern_of(name), []).append(i)
        names = [
            ", ".join(folded(self.layers[i] for i in of)) + (f" ({len(of)})" if len(of) > 1 else "")
            for of in held.values()
        ]
        means = [[_mean([self.values[i][j] for i in of]) for j in range(len(self.networks))] for of in held.values()]
        return names, means


def sparsity_maps(report: RunReport) -> list[SparsityMap]:
    """One for each pattern."""
    if not report.masks:
        return []
    patterns = dict.fromkeys(r.pattern for r in report.networks if r.name in report.masks["sparsity"])
    return [SparsityMap(report, p) for p in patterns]


def sparsity_section(report: RunReport, prefix: str) -> str:
    """A heat map for each pattern; nothing where the run recorded none."""
    del prefix
    out = []
    for found in sparsity_maps(report):
        columns = [(n.partition("@")[2] or n, r) for n, r in zip(found.networks, found.rounds, strict=True)]
        marks = [attributes(network=n) for n in found.networks]
        caption = (
            f"{found.pattern}: zeros of each layer's weight, %, removed channels included; a column for each network"
        )
        whole = heat_table(caption, found.layers, columns, found.values, marks)
        if len(found.layers) > MOST_ROWS:
            names, means = found.by_block()
            short = heat_table(f"{caption}; means over repeated blocks", names, columns, means, marks)
            whole = short + details(f"All {len(found.layers)} layers", whole)
        out.append(f"<div{attributes(pattern=found.pattern)}>{whole}</div>")
    return "".join(out)


def overlap_section(report: RunReport, prefix: str) -> str:
    """Of what two networks keep, the share that both do, and what it would be by chance."""
    del prefix
    if not report.masks or not report.masks["names"]:
        return ""
    names: Sequence[str] = report.masks["names"]
    patterns = {r.name: r.pattern for r in report.networks}
    marks = [attributes(network=n, pattern=patterns.get(n, "")) for n in names]

    def table(caption: str, values: Sequence[Sequence[float]]) -> str:
        return heat_table(caption, names, [(n, "") for n in names], values, marks, marks, tall=True)

    overlap: list[list[float]] = report.masks["overlap"]
    chance: list[list[float]] = report.masks["chance"]
    lines = "".join(f"<li>{escape(line)}</li>" for line in between_patterns(report))
    return (
        '<p class="quiet">Of the eligible weights that either of two networks keeps, the share that both keep (Jaccard '
        "index). By chance: the same if each had drawn as many weights of every layer at random.</p>"
        f"<ul>{lines}</ul>"
        + table("Overlap of kept weights, %", overlap)
        + details("What it would be by chance", table("Overlap by chance, %", chance))
    )


def between_patterns(report: RunReport) -> list[str]:
    """Mean overlap between each two patterns, beside chance's, in words."""
    names, patterns = report.masks["names"], {r.name: r.pattern for r in report.networks}
    pairs: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for i, a in enumerate(names):
        for j in range(i + 1, len(names)):
            key = (patterns.get(a, ""), patterns.get(names[j], ""))
            pairs.setdefault(key, []).append((report.masks["overlap"][i][j], report.masks["chance"][i][j]))
    out = []
    for (a, b), of in pairs.items():
        mean, chance = (sum(v[k] for v in of) / len(of) for k in (0, 1))
        who = f"{a} with {b}" if a != b else f"{a} among themselves"
        out.append(f"{who}: {100 * mean:.0f} % on average, {100 * chance:.0f} % by chance")
    return out


def kept_section(report: RunReport) -> str:
    """Reasons, each once, with what they keep; nothing where the run recorded none."""
    if not report.kept and not report.masks:
        return ""
    reasons: dict[tuple[str, str], list[str]] = {}
    for entry in report.kept:
        reasons.setdefault((entry["what"], entry["reason"]), []).append(entry["where"].removesuffix(".weight"))
    if not reasons:
        return "<p>Nothing: every weight and every channel may go.</p>"
    said = {"weights": "its weights (unstructured, N:M)", "channels": "its output channels"}
    rows = "".join(
        f'<tr><th scope="row">{escape(said.get(what, what))}</th><td class="long">{escape(_names(where))}</td>'
        f'<td class="long">{escape(reason)}</td></tr>'
        for (what, reason), where in reasons.items()
    )
    return (
        '<div class="scroll" role="region" tabindex="0" aria-label="What is kept whole"><table class="words">'
        "<caption>What no pattern may touch</caption>"
        '<thead><tr><th scope="col">what stays</th><th scope="col" class="text">of which layers</th>'
        f'<th scope="col" class="text">why</th></tr></thead><tbody>{rows}</tbody></table></div>'
    )


def _names(where: Sequence[str]) -> str:
    return ", ".join(folded(w for w in where if w)) or "the whole model"


def _mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else None
