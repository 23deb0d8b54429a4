"""Which runs the comparison of methods is made of, and how their rows are kept."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from result_rows import KINDS, Row, kind_of, read_rows, write_rows

from cocktailsdk.patterns import Channel, Pattern, Unstructured
from cocktailsdk.training.recipes import Recipe, recipe_named, recipes
from cocktailsdk.training.recipes.steps import Pivot

RESULTS = Path(__file__).resolve().parent / "results" / "quality.json"

PATTERNS: Mapping[str, tuple[str | Pattern, ...]] = {
    "all": ("unstructured", "n:m", Channel(round_to=1)),
    "unstructured": ("unstructured",),
    "n:m": ("n:m",),
    "channel": (Channel(round_to=1),),
    **{f"unstructured@{s}": (Unstructured(sparsities=[s]),) for s in (0.2, 0.488, 0.738, 0.866)},
}
"""What a run trains, by the name that its row has."""


@dataclass(frozen=True)
class Method:
    """A method, and the runs that it needs for what ours gives in one.

    Attributes:
        name: In the table.
        recipe: How it trains.
        runs: By what is trained, the share of the budget of steps. A method that trains one pattern a run has the
            budget for each; one that trains one network a run shares a pattern's budget among four of its levels.
    """

    name: str
    recipe: Recipe
    runs: Mapping[str, float]


PAPER = recipe_named("paper")
ALL = {"all": 1.0}

GOES_ON: Mapping[str, Any] = {"rewind": False, "merging": "none"}
"""Rounds go on from where the one before ended; with half of the steps for finishing that is our default."""

OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "paper + finishing": {"finishing": 0.25},
    "paper + same batch": {"same_batch": True},
    "paper + active updates": {"update": "active"},
    "paper + separate statistics": {"statistics": "separate"},
    "paper + layerwise merging": {"merging": "layerwise"},
    "paper + gradient merging": {"merging": "gradient"},
    "paper + half finishing": {"finishing": 0.5},
    "paper + three quarters finishing": {"finishing": 0.75},
    "half, same batch": {"finishing": 0.5, "same_batch": True},
    "half, three on the same batch": {"finishing": 0.5, "same_batch": True, "finishing_schedule": Pivot(sparse=3)},
    "half, no rewinding, same batch": {"finishing": 0.5, **GOES_ON, "same_batch": True},
    "half, no rewinding, no distillation": {"finishing": 0.5, **GOES_ON, "distill": False},
    "quarter, no rewinding": {"finishing": 0.25, **GOES_ON},
    "three quarters, no rewinding": {"finishing": 0.75, **GOES_ON},
}
"""What goes beyond the paper, each judged alone."""

RIVALS: Mapping[str, Mapping[str, float]] = {
    "imp": {"unstructured": 1.0, "n:m": 1.0, "channel": 1.0},
    "us-net": {"channel": 0.25},  # a step trains four networks, so a quarter of the steps costs the same
    "mutualnet": {"channel": 0.25},
    "refilling": ALL,
    "ast": {"unstructured": 1.0, "n:m": 1.0},
    "ac/dc": {name: 0.25 for name in PATTERNS if name.startswith("unstructured@")},
}


THRICE = "cocktail, three times the steps"
"""Our default at the cost of what trains one pattern a run: the budget for each of three patterns, in one run."""

LABELS = ("us-net", "us-net with labels")
"""A rival, and the name of its variant whose narrow networks learn from the labels alone, not from the widest."""


def methods() -> dict[str, Method]:
    """All that there are recipes for, the most important first."""
    known = recipes()
    out = [Method("cocktail", recipe_named("cocktail"), ALL), Method("paper", PAPER, ALL)]
    out += [Method(n, known[n], runs) for n, runs in RIVALS.items() if n in known]
    out += [Method(THRICE, replace(recipe_named("cocktail"), name=THRICE), {"all": 3.0})]
    published, variant = LABELS
    out += [Method(variant, replace(known[published], name=variant, distill=0.0), RIVALS[published])]
    out += [Method(n, known[n], ALL) for n in known if n.startswith("paper-")]
    for name, changes in OPTIONS.items():
        try:
            out.append(Method(name, replace(PAPER, name=name, **changes), ALL))
        except Exception:  # an option that this version does not have
            continue
    return {m.name: m for m in out}


@dataclass(frozen=True)
class Run:
    """One run of the table."""

    task: str
    method: str
    pattern: str
    seed: int

    @property
    def key(self) -> str:
        """Names it, also as a folder."""
        return f"{self.task}--{self.method}--{self.pattern}--{self.seed}".replace("/", "").replace(" ", "_")

    def found_in(self, rows: Iterable[Row], steps: int) -> bool:
        """Whether there is a row of it with this budget."""
        mine = (self.task, self.method, self.pattern, self.seed, steps)
        return any((r["task"], r["method"], r["pattern"], r["seed"], r["budget"]) == mine for r in rows)


def read(path: Path = RESULTS) -> list[Row]:
    """All rows."""
    return read_rows(path)


def write(rows: Iterable[Row], path: Path = RESULTS) -> None:
    """Replaces the file."""
    write_rows(rows, path, ("task", "method", "pattern", "seed"))


@dataclass(frozen=True)
class Line:
    """A method's seeds, together.

    Attributes:
        task: Of its rows.
        method: Its name.
        budget: Steps of a whole run.
        seeds: How many.
        dense: Mean accuracy in %.
        means: By pattern, the mean over its networks and seeds; ``None`` where it trains none.
        sparse: Over all sparse networks, where it trains all three patterns.
        spread: Standard deviation of that (or of what there is) over seeds; ``None`` of one.
        stored: Sets of parameters stored, as a multiple of the dense network's, over all of its runs.
        seconds: Of all of its runs, by seed.
    """

    task: str
    method: str
    budget: int
    seeds: int
    dense: float
    means: Mapping[str, float | None]
    sparse: float | None
    spread: float | None
    stored: float
    seconds: float


def lines(rows: Iterable[Row]) -> list[Line]:
    """A line for every task, method and budget, best first."""
    groups: dict[tuple[str, str, int], dict[int, list[Row]]] = {}
    for row in rows:
        groups.setdefault((row["task"], row["method"], row["budget"]), {}).setdefault(row["seed"], []).append(row)
    out = []
    for (task, method, budget), seeds in groups.items():
        networks = [_networks(runs) for runs in seeds.values()]
        by_kind = {kind: [mean(n[kind].values()) for n in networks if n[kind]] for kind in KINDS}
        means = {kind: mean(values) if values else None for kind, values in by_kind.items()}
        whole = all(by_kind.values())
        every = [mean(v for kind in KINDS for v in n[kind].values()) for n in networks]
        out.append(
            Line(
                task,
                method,
                budget,
                len(seeds),
                mean(mean(r["networks"]["dense"] for r in runs) for runs in seeds.values()) * 100,
                {k: None if v is None else 100 * v for k, v in means.items()},
                100 * mean(every) if whole else None,
                100 * stdev(every) if len(every) > 1 else None,
                mean(sum(r["stored"] / r["parameters"] for r in runs) for runs in seeds.values()),
                mean(sum(r["seconds"] for r in runs) for runs in seeds.values()),
            )
        )
    return sorted(out, key=lambda x: (x.task, -x.budget, -(x.sparse or 0), -(x.means["unstructured"] or 0)))


def network_means(rows: Iterable[Row], method: str) -> dict[str, float]:
    """Accuracy by network, the dense one first, the mean over a method's runs and seeds."""
    found: dict[str, list[float]] = {}
    for row in rows:
        if row["method"] == method:
            for name, value in row["networks"].items():
                found.setdefault(name, []).append(value)
    kinds = ("dense", *KINDS)
    kind = {n: kinds.index(kind_of(n)) for n in found}
    level = {n: float(n.partition("@")[2] or 0) for n in found}
    return {n: mean(found[n]) for n in sorted(found, key=lambda n: (kind[n], level[n], n))}


def _networks(runs: Iterable[Row]) -> dict[str, dict[str, float]]:
    """By pattern, the accuracy of every sparse network of a seed's runs."""
    out: dict[str, dict[str, float]] = {kind: {} for kind in KINDS}
    for row in runs:
        for name, value in row["networks"].items():
            if name != "dense":
                out[kind_of(name)][name] = value
    return out
