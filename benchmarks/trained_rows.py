"""Rows of the comparison from trained weights, and the tables made of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from tempfile import gettempdir

from filelock import FileLock
from result_rows import Row, read_rows, write_rows
from trained_pieces import B, alone_name
from trained_rate import ExchangeRate, exchange_rate
from trained_tasks import TASKS

RESULTS = Path(__file__).resolve().parent / "results" / "trained.json"

SHORT = {"unstructured@0": "u@", "channel@0": "c@"}
"""How names of networks begin in a table's head."""


def add_row(row: Row, path: Path) -> None:
    """Keep a row in the place of an earlier one of the same run; several processes may do so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(Path(gettempdir()) / f"{path.name}.lock"):
        same = ("task", "key")
        rows = [r for r in read_rows(path) if any(r[k] != row[k] for k in same)]
        write_rows([*rows, row], path, same)


def curves(rows: Iterable[Row], *, distilled: bool = False, task: str = "resnet20") -> dict[str, dict[int, float]]:
    """Accuracy in % by passes alone, for each subnetwork; of several rates the best for B by name."""
    rows = [r for r in rows if r["task"] == task]
    out: dict[str, dict[int, float]] = {}
    for name in TASKS[task].alone:
        mine = [r for r in rows if r["run"] == alone_name(name, distilled=distilled)]
        if not mine:
            continue
        rate = best_rate(mine, name)
        curve = {r["budget"]: r["accuracies"][name] for r in mine if r["rate"] == rate}
        untrained = [r for r in rows if r["run"] == "start"]
        out[name] = dict(sorted({**curve, **({0: untrained[0]["accuracies"][name]} if untrained else {})}.items()))
    return out


def best_rate(rows: Sequence[Row], name: str) -> float:
    """The rate that most budgets were run with; of these the best: a pattern's rate is chosen once."""
    counts = {rate: sum(r["rate"] == rate for r in rows) for rate in {r["rate"] for r in rows}}
    return max(counts, key=lambda rate: (counts[rate], max(r["accuracies"][name] for r in rows if r["rate"] == rate)))


def rate_of(row: Row, alone: Mapping[str, Mapping[int, float]]) -> ExchangeRate | None:
    """A row's exchange rate; ``None`` where it lacks some of the subnetworks, or runs alone are missing."""
    five = TASKS[row["task"]].alone
    complete = all(n in row["accuracies"] and {0, B} <= alone.get(n, {}).keys() for n in five)
    return exchange_rate(row["accuracies"], row["passes"], alone, B) if complete and row["passes"] else None


def groups(rows: Iterable[Row]) -> dict[tuple[str, int], list[Row]]:
    """The rows of each run and budget: its seeds; of several rates those with the best mean over subnetworks."""
    by_rate: dict[tuple[str, int], dict[float | None, list[Row]]] = {}
    for row in rows:
        by_rate.setdefault((row["run"], row["budget"]), {}).setdefault(row["rate"], []).append(row)

    def sparse(found: Sequence[Row]) -> float:
        return mean(v for r in found for n, v in r["accuracies"].items() if n != "dense" or len(r["accuracies"]) == 1)

    return {key: max(rates.values(), key=sparse) for key, rates in by_rate.items()}


def means(rows: Sequence[Row]) -> dict[str, float]:
    """Accuracy by network, the mean over seeds."""
    return {name: mean(r["accuracies"][name] for r in rows) for name in rows[0]["accuracies"]}


def head(name: str) -> str:
    """A network's name, short."""
    for long, short in SHORT.items():
        name = name.replace(long, short)
    return name


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose columns but the first are aligned right."""
    lines = [f"| {' | '.join(head)} |", f"| --- |{' --: |' * (len(head) - 1)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def run_table(rows: Sequence[Row], task: str = "resnet20") -> str:
    """A line for each run of several networks: passes, accuracies, exchange rates, CPU seconds."""
    mine = [r for r in rows if r["task"] == task]
    labels, taught = curves(mine, task=task), curves(mine, distilled=True, task=task)
    named = TASKS[task].named
    lines = []
    shared = {k: g for k, g in groups(mine).items() if len(g[0]["accuracies"]) > 1}
    for (name, _), found in sorted(shared.items(), key=lambda item: item[0][::-1]):
        accuracy = means(found)
        cells = [f"{accuracy[n]:.1f}" if n in accuracy else "" for n in named]
        for alone in (labels, taught):
            rates = [x.rate for r in found if (x := rate_of(r, alone)) is not None]
            cells.append(f"{mean(rates):.1f}" if rates else "")
        seconds = mean(r["cpu_seconds"] for r in found)
        rate = "" if found[0]["rate"] is None else f"{found[0]['rate']:g}"
        passes = f"{found[0]['passes']}"
        lines.append([name, passes, rate, str(len(found)), *cells, f"{seconds:.0f}"])
    columns = ["run", "passes", "rate", "seeds", *map(head, named), "exchange rate", "against distilled", "CPU s"]
    return markdown(columns, lines)


def alone_table(rows: Sequence[Row], task: str = "resnet20") -> str:
    """A line for each budget alone, a column for each subnetwork."""
    mine = [r for r in rows if r["task"] == task]
    names, lines = TASKS[task].alone, []
    for title, distilled in (("alone, labels", False), ("alone, distilled", True)):
        found = curves(mine, distilled=distilled, task=task)
        for passes in sorted({p for curve in found.values() for p in curve}):
            if passes or not distilled:
                cells = [f"{found[n][passes]:.1f}" if passes in found.get(n, {}) else "" for n in names]
                lines.append([title if passes else "no training", str(passes), *cells])
    pruned: dict[tuple[str, int], dict[str, float]] = {}
    for (run, budget), group in groups(mine).items():
        label, _, subnet = run.rpartition(" ")
        if label.startswith("torch-pruning"):
            pruned.setdefault((label, budget), {})[subnet] = means(group)[subnet]
    for (label, budget), accuracy in sorted(pruned.items()):
        lines.append([label, str(budget), *(f"{accuracy[n]:.1f}" if n in accuracy else "" for n in names)])
    return markdown(["run", "passes each", *map(head, names)], lines)


TARGETS = {"unstructured@0.893": 70.0, "2:4": 80.5, "channel@0.469": 64.0, "channel@0.613": 52.0}
"""Accuracy in % that our default is to reach with B passes."""
RATE_WANTED, DENSE_LOSS = 12.0, 0.5
"""The exchange rate that it is to reach, and the points that the dense network may lose."""


def target_table(rows: Sequence[Row]) -> str:
    """What our default is to reach on ResNet-20, and what it reaches: the mean and the worst over seeds."""
    mine = [r for r in rows if r["task"] == "resnet20"]
    alone, lines = curves(mine), []
    start = next((r["accuracies"] for r in mine if r["run"] == "start"), {})

    def add(what: str, budget: int, wanted: float, found: Sequence[float]) -> None:
        margin = f"{mean(found) - wanted:+.1f}"
        lines.append([what, str(budget), f"{wanted:.1f}", f"{mean(found):.1f}", f"{min(found):.1f}", margin])

    for budget in (B, 2 * B):
        ours = [r for r in mine if (r["run"], r["budget"]) == ("ours", budget)]
        if not ours or not start:
            continue
        wanted = {"dense": start["dense"] - DENSE_LOSS}
        wanted |= TARGETS if budget == B else {n: alone[n][B] for n in alone if B in alone[n]}
        for name, least in wanted.items():
            add(head(name), budget, least, [r["accuracies"][name] for r in ours])
        rates = [x.rate for r in ours if (x := rate_of(r, alone)) is not None]
        if budget == B and rates:
            add("exchange rate", budget, RATE_WANTED, rates)
    return markdown(["target", "passes", "wanted", "mean", "worst seed", "margin"], lines)
