"""The tables of docs/reproducing.md: the paper's figures, and ours where there are any."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
NOT_RUN = "not run"
METHODS = {
    "MutualNet": "mutualnet",
    "AC/DC": "ac/dc",
    "AST": "ast",
    "Sparse Cocktail": "paper",
    "Refilling": "refilling",
}
"""The paper's methods, and what the recipes are called here."""

KINDS = ("unstructured", "channel", "n:m")
LEVELS = {
    "unstructured": ("unstructured@0.2", "unstructured@0.488", "unstructured@0.738", "unstructured@0.866"),
    "channel": ("channel@0.1", "channel@0.271", "channel@0.469", "channel@0.613"),
    "N:M": ("dense", "1:2", "2:4", "4:8"),
}
"""The networks of Table 2, by pattern."""


def paper_blocks() -> list[str]:
    """One block for each pair of marks on the page, in their order."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    paper = json.loads((ROOT / "benchmarks" / "paper.json").read_text(encoding="utf-8"))
    small, large = _read("quality"), _resnet18()
    parts = (
        _overview(small, large),
        _means(paper["tables 1 and 3"], small, large),
        _networks(paper["table 2"], small, large),
        _detection(paper["table 4"]),
        _merging(paper["table 7"]),
        _costs(paper["tables 9 and 10"]),
        _hours(paper["table 11"]),
    )
    return ["\n".join(lines) + "\n" for lines in parts]


def _read(name: str) -> list[dict[str, Any]]:
    path = RESULTS / f"{name}.json"
    rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.is_file() else []
    return [r for r in rows if r.get("task", "") in ("", "cifar", "resnet18") and r.get("pattern") != "try"]


def _resnet18() -> dict[str, list[dict[str, Any]]]:
    """By recipe the rows of ResNet-18 on CIFAR-10 with the longest schedule."""
    out: dict[str, list[dict[str, Any]]] = {}
    for row in _read("quality_gpu"):
        out.setdefault(row["method"], []).append(row)
    return {
        name: [r for r in rows if r["epochs_scale"] == max(x["epochs_scale"] for x in rows)]
        for name, rows in out.items()
    }


def _kind(name: str) -> str:
    return name.partition("@")[0] if "@" in name else "dense" if name == "dense" else "n:m"


def _found(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Accuracy by network in %, the mean over rows."""
    values: dict[str, list[float]] = {}
    for row in rows:
        for name, value in row["networks"].items():
            values.setdefault(name, []).append(100 * value)
    return {name: mean(v) for name, v in values.items()}


def _by_kind(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    values: dict[str, list[float]] = {}
    for name, value in _found(rows).items():
        values.setdefault(_kind(name), []).append(value)
    return {kind: mean(v) for kind, v in values.items()}


def _scale(rows: Sequence[Mapping[str, Any]]) -> str:
    epochs, seeds = round(150 * rows[0]["epochs_scale"]), len({r["seed"] for r in rows})
    return f"ResNet-18, {epochs} epochs a round, {seeds} seed{'s' if seeds > 1 else ''}"


def _seeds(rows: Sequence[Mapping[str, Any]]) -> str:
    seeds = len({r["seed"] for r in rows})
    return f"ResNet-8, {seeds} seed{'s' if seeds > 1 else ''}"


def _overview(small: Sequence[Mapping[str, Any]], large: Mapping[str, Any]) -> list[str]:
    resnet18 = f"ResNet-18: {'a shorter schedule' if 'paper' in large else NOT_RUN}"
    if "paper" in large and large["paper"][0]["epochs_scale"] >= 1:
        resnet18 = "ResNet-18: run"
    tiny = "ResNet-8 at 16x16: run" if small else f"ResNet-8: {NOT_RUN}"
    detection = f"small sets: {'run' if (RESULTS / 'detection.json').is_file() else NOT_RUN}"
    costs = "run" if (RESULTS / "costs.json").is_file() else NOT_RUN
    figures = "small scale: run" if small else NOT_RUN
    rows = [
        ("Table 1", "means by pattern, CIFAR-10", "`quality_gpu.py`, `quality.py`", f"{resnet18}; {tiny}"),
        ("Table 1", "means by pattern, ImageNet", 'your loader, `recipe="paper"`', NOT_RUN),
        ("Table 2", "single networks", "as Table 1", f"CIFAR-10, {resnet18}; {tiny}; ImageNet: {NOT_RUN}"),
        ("Table 3", "beside Refilling", "`quality.py`", tiny),
        (
            "Table 4",
            "detection on COCO",
            "`train_net.py`",
            f"COCO: {NOT_RUN}; {detection}",
        ),
        ("Table 7", "before and after merging", "`quality.py`", NOT_RUN),
        ("Tables 9, 10", "operations and memory", "`costs.py`", costs),
        ("Table 11", "hours", "`engine.py`", "a step against a dense step: run"),
        ("Figure 3", "ablations", "`quality_figures.py`", figures),
        ("Figures 6, 7", "chosen α, and the way between rounds", "`quality_figures.py`", figures),
    ]
    return [
        "| paper | what | command | ours |",
        "| --- | --- | --- | --- |",
        *("| " + " | ".join(r) + " |" for r in rows),
    ]


def _means(paper: Mapping[str, Any], small: Sequence[Mapping[str, Any]], large: Mapping[str, Any]) -> list[str]:
    out: list[str] = []
    for title, methods in paper.items():
        out += [
            f"**{title}**",
            "",
            "| method, networks | figures | dense | unstructured | channel | N:M |",
            "| --- | --- | --: | --: | --: | --: |",
        ]
        for method, figures in methods.items():
            many = f"{method}, {figures['networks']}" if "networks" in figures else method
            out.append(_line(many, "paper", figures))
            if "ImageNet" in title:
                continue
            out.append(_ours(large.get(METHODS[method], ()), _scale, "ResNet-18"))
            out.append(_ours([r for r in small if r["method"] == METHODS[method]], _seeds, "ResNet-8"))
        if "ImageNet" in title:
            out.append(f"| all of them | ours | {NOT_RUN} | | | |")
        else:
            ours = ((large.get("cocktail", ()), _scale), ([r for r in small if r["method"] == "cocktail"], _seeds))
            out += [_line("our default, 24", where(rows), _by_kind(rows)) for rows, where in ours if rows]
        out.append("")
    return out


def _ours(rows: Sequence[Mapping[str, Any]], where: Any, otherwise: str) -> str:
    return _line("", where(rows), _by_kind(rows)) if rows else f"| | {otherwise} | {NOT_RUN} | | | |"


def _line(method: str, where: str, figures: Mapping[str, float]) -> str:
    dense = figures.get("dense")
    cells = ["" if dense is None else f"{dense:.2f}"]
    for kind in KINDS:
        value = figures.get(kind)
        below = "" if value is None or dense is None else f" ({dense - value:.1f})"
        cells.append("" if value is None else f"{value:.2f}{below}")
    return f"| {method} | {where} | " + " | ".join(cells) + " |"


def _networks(paper: Mapping[str, Any], small: Sequence[Mapping[str, Any]], large: Mapping[str, Any]) -> list[str]:
    out: list[str] = []
    for title, methods in paper.items():
        for pattern, names in LEVELS.items():
            shown = " | ".join(f"`{name}`" for name in names)
            out += [f"**{title}, {pattern}**", "", f"| method | figures | {shown} |", "| --- | --- |" + " --: |" * 4]
            for method, figures in methods.items():
                name, _, of = method.partition(", ")
                if of != pattern:
                    continue
                out.append(_cells(name, "paper", figures))
                if "ImageNet" in title:
                    continue
                out.append(_single(large.get(METHODS[name], ()), names, _scale, "ResNet-18"))
                out.append(_single([r for r in small if r["method"] == METHODS[name]], names, _seeds, "ResNet-8"))
            out += [f"| all of them | ours | {NOT_RUN} | | | |", ""] if "ImageNet" in title else [""]
    return out


def _single(rows: Sequence[Mapping[str, Any]], names: Sequence[str], where: Any, otherwise: str) -> str:
    found = _found(rows)
    if not any(name in found for name in names):
        return f"| | {otherwise} | {NOT_RUN} | | | |"
    return _cells("", where(rows), [found.get(name) for name in names])


def _cells(first: str, where: str, values: Sequence[float | None]) -> str:
    return f"| {first} | {where} | " + " | ".join("" if v is None else f"{v:.2f}" for v in values) + " |"


def _detection(paper: Mapping[str, Any]) -> list[str]:
    out = [
        "| paper, COCO | dense | MutualNet | Sparse Cocktail | ours, COCO |",
        "| --- | --: | --: | --: | --- |",
    ]
    for title, figures in paper.items():
        cells = [
            figures["dense"],
            *(f"{figures[m]:.1f} ({figures['dense'] - figures[m]:.1f})" for m in METHODS if m in figures),
        ]
        out.append(f"| {title} | " + " | ".join(map(str, cells)) + f" | {NOT_RUN} |")
    return out


def _merging(paper: Mapping[str, Any]) -> list[str]:
    out = ["| paper | dense | unstructured | channel | N:M | ours |", "| --- | --: | --: | --: | --: | --- |"]
    for title, figures in paper.items():
        cells = [f"{before:.2f} → {after:.2f}" for before, after in figures.values()]
        out.append(f"| {title} | " + " | ".join(cells) + f" | {NOT_RUN} |")
    return out


def _costs(paper: Mapping[str, Any]) -> list[str]:
    path = RESULTS / "costs.json"
    found = json.loads(path.read_text(encoding="utf-8"))["costs"] if path.is_file() else {}
    out = [
        "| network | paper, GMACs | ours, GMACs | paper, GB | ours, GB |",
        "| --- | --: | --: | --: | --: |",
    ]
    whole, ours = paper["dense"], found.get("dense")
    for name, figures in paper.items():
        cells = [f"{figures['gmacs']:.2f} ({100 * figures['gmacs'] / whole['gmacs']:.0f} %)", NOT_RUN]
        cells += [f"{figures['gigabytes']:.3f} ({100 * figures['gigabytes'] / whole['gigabytes']:.0f} %)", NOT_RUN]
        if ours is not None and name in found:
            macs, peak = found[name]["macs"], found[name]["peak_bytes"]
            cells[1] = f"{macs / 1e9:.2f} ({100 * macs / ours['macs']:.0f} %)"
            cells[3] = f"{peak / 1e9:.3f} ({100 * peak / ours['peak_bytes']:.0f} %)"
        out.append(f"| `{name}` | " + " | ".join(cells) + " |")
    return out


def _hours(paper: Mapping[str, float]) -> list[str]:
    from engine import pooled

    most = paper["Sparse Cocktail"]
    told = ", ".join(f"{name} {hours}" for name, hours in paper.items())
    less = sorted(most / hours - 1 for name, hours in paper.items() if name != "Sparse Cocktail")
    out = [
        f"Paper, hours for CIFAR-10 on one GPU: {told}; Sparse Cocktail takes {100 * less[0]:.0f} to "
        f"{100 * less[-1]:.0f} % more than the others. Ours, hours: {NOT_RUN}.",
        "",
    ]
    path = RESULTS / "engine.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    for key in ("step resnet18 paper", "step vit paper"):
        if "rows" in found.get(key, {}):
            ratio, environment = pooled(found[key]["rows"]), found[key].get("environment", {})
            out.append(
                f'- Ours, a step of `recipe="paper"` against a dense step, {key.split()[1]}: {100 * (ratio - 1):.0f} % '
                f"more (`python benchmarks/engine.py`, {environment.get('device') or environment.get('machine', '')})."
            )
    return out
