"""Rows of the table: how they are read, and what they come to."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

RESULTS = Path(__file__).resolve().parents[1] / "results" / "zoo.jsonl"
OURS, THEIRS = "cocktail", "torch-pruning"
MEDIANS = {"timm": 0.35, "hf": 0.60}
"""By library, the share of FLOPs that the median model may keep."""

Row = dict[str, Any]
Rows = Mapping[tuple[str, str], Row]


def read(path: Path) -> dict[tuple[str, str], Row]:
    """Rows by contender and model; of several the last."""
    if not path.exists():
        return {}
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
    return {(r["contender"], r["model"]): r for r in rows}


def good(row: Row | None) -> bool:
    """Whether it ran, shrank and is equal."""
    return row is not None and row["ok"] and row["equal"]


def told(row: Row | None) -> str:
    """A row in a few words."""
    if row is None:
        return ""
    if row.get("stage") != "done":
        return row.get("error", "failed").splitlines()[0][:48]
    if not row["shape_kept"]:
        return f"another output shape, {row['flops_kept']:.3f}"
    verdict = f"{row['error_relative']:.0e}" if row["equal"] else f"NOT EQUAL {row['error_relative']:.0e}"
    return f"{verdict}, {row['flops_kept']:.3f}"


@dataclass(frozen=True)
class Library:
    """What the models of one library come to.

    Attributes:
        name: ``"timm"`` or ``"hf"``.
        built: How many models there are that build.
        ours: How many of them run, shrink and are equal.
        theirs: The same for Torch-Pruning.
        tried: How many Torch-Pruning was tried on.
        kept: FLOPs kept by the median model of ours.
        short: Models of ours that fall short, with why.
    """

    name: str
    built: int
    ours: int
    theirs: int
    tried: int
    kept: float
    short: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Summary:
    """What all rows come to.

    Attributes:
        libraries: One after the other.
        unbuilt: Models that do not build, with why.
        time: Our time to label and group, as a share of Torch-Pruning's to build its graph: the median over what both
            handle; ``None`` where there is nothing to compare.
        handled: How many models that is.
        slowest: The model that took longest to label and group, and its seconds.
    """

    libraries: tuple[Library, ...]
    unbuilt: tuple[tuple[str, str], ...]
    time: float | None
    handled: int
    slowest: tuple[str, float] | None

    @property
    def fine(self) -> bool:
        """Whether everything that was asked holds."""
        quick = (self.time is None or self.time <= 0.5) and (self.slowest is None or self.slowest[1] <= 30)
        return quick and all(x.ours == x.built and x.kept <= MEDIANS[x.name] for x in self.libraries)

    def lines(self) -> list[str]:
        """In words."""
        out = []
        for x in self.libraries:
            out.append(
                f"{x.name}: {x.ours} of {x.built} run, shrink and are equal (Torch-Pruning {x.theirs} of {x.tried}); "
                f"median FLOPs kept {x.kept:.3f}, at most {MEDIANS[x.name]}"
            )
            out += [f"  falls short: {model}: {why}" for model, why in x.short]
        out += [f"  does not build: {model}: {why}" for model, why in self.unbuilt]
        if self.time is not None and self.slowest is not None:
            out.append(
                f"label and group, without the export: median {self.time:.2f} of Torch-Pruning's graph building over "
                f"the {self.handled} models that both handle (at most 0.5); slowest {self.slowest[0]}, "
                f"{self.slowest[1]} s (at most 30)"
            )
        return out


def summary(rows: Rows, chosen: Sequence[str]) -> Summary:
    """What the rows of some models come to."""
    libraries = []
    for kind in MEDIANS:
        models = [m for m in chosen if m.startswith(kind) and rows.get((OURS, m), {}).get("stage", "build") != "build"]
        if not models:
            continue
        ours, theirs = ([m for m in models if good(rows.get((who, m)))] for who in (OURS, THEIRS))
        kept = [rows[OURS, m]["flops_kept"] for m in models if "flops_kept" in rows[OURS, m]]
        short = tuple((m, rows[OURS, m].get("error") or told(rows[OURS, m])) for m in models if m not in ours)
        tried = sum((THEIRS, m) in rows for m in models)
        libraries.append(
            Library(kind, len(models), len(ours), len(theirs), tried, median(kept) if kept else 1.0, short)
        )
    unbuilt = tuple(
        (m, str(row.get("error", ""))[:160]) for m in chosen if (row := rows.get((OURS, m), {})).get("stage") == "build"
    )
    both = [m for m in chosen if all(good(rows.get((who, m))) for who in (OURS, THEIRS))]
    timed = {m: float(rows[OURS, m]["group_s"]) for m in chosen if "group_s" in rows.get((OURS, m), {})}
    ratio = median(timed[m] / max(rows[THEIRS, m]["group_s"], 1e-3) for m in both) if both else None
    slowest = max(timed.items(), key=lambda x: x[1]) if timed else None
    return Summary(tuple(libraries), unbuilt, ratio, len(both), slowest)
