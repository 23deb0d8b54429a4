"""The figures of the first page, each with the page that has the rest of them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from trained_tables import trained_line

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
SLIM = "channel@0.613"


def home_block(folder: str = "") -> str:
    """A line for each thing that was measured; none where its results are not there.

    Args:
        folder: Where the pages lie, as seen from the one that has the table.
    """
    sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "benchmarks" / "zoo")]
    lines = [
        line
        for row in (_bytes, _equal, _speed, trained_line, _quality, _steps, _killed, _fuzzed, _large)
        for line in row()
    ]
    lines = [line.replace("](", f"]({folder}") for line in lines]
    return "\n".join(["| | measured | |", "| --- | --- | --- |", *lines]) + "\n"


def _read(name: str) -> Any:
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _bytes() -> list[str]:
    found = _read("bundle_size") or {"rows": []}
    return [
        f"| Bytes | {r['networks']} networks of {r['model'].partition(':')[2] or r['model']} in "
        f"{r['bundle_bytes_as they are'] / r['dense_bytes']:.2f} times one dense checkpoint | "
        "[bundles](bundle-format.md) |"
        for r in found["rows"]
    ]


def _equal() -> list[str]:
    from rows import read, summary

    path = RESULTS / "zoo.jsonl"
    if not path.is_file():
        return []
    rows = read(path)
    found = summary(rows, list(dict.fromkeys(model for _, model in rows))).libraries
    titles = {"timm": "timm families", "hf": "transformers types"}
    told = " and ".join(f"{x.ours} of {x.built} {titles[x.name]}" for x in found)
    theirs, tried = sum(x.theirs for x in found), sum(x.tried for x in found)
    return [
        f"| Slim computes what masked does | {told} (Torch-Pruning under the same check: {theirs} of {tried}) "
        "| [every family](zoo.md) |"
    ]


def _speed() -> list[str]:
    from deploy_tables import TITLES

    found = _read("deploy")
    if found is None:
        return []
    slim = {r["runtime"]: r for r in found["rows"] if r["network"] == SLIM}
    zeros = [r["ratio"] for r in found["rows"] if r["pattern"] == "unstructured"]
    told = [f"{slim[k]['ratio']:.1f} times in {TITLES[k]}" for k in TITLES if k in slim]
    if not told:
        return []
    share = 100 * next(iter(slim.values()))["flops"]
    alone = f"; zeros alone {min(zeros):.2f} to {max(zeros):.2f} times" if zeros else ""
    return [
        f"| Speed on a processor | {found['model']} at {share:.0f} % of its FLOPs: {', '.join(told)}{alone} "
        "| [exporting](exporting.md#what-each-runtime-speeds-up) |"
    ]


def _quality() -> list[str]:
    from quality_rows import THRICE, lines, read

    found = {(x.task, x.method): x for x in lines(read(RESULTS / "quality.json"))}
    ours, paper, ast, thrice = (found.get(("cifar", name)) for name in ("cocktail", "paper", "ast", THRICE))
    if ours is None or paper is None:
        return []
    beside = ""
    if ast is not None:
        kinds = [k for k in ("unstructured", "n:m") if ast.means[k] is not None and ours.means[k] is not None]
        gaps = [f"{ast.means[k] - ours.means[k]:.1f} in {'N:M' if k == 'n:m' else k} networks" for k in kinds]
        beside = f"; AST with as many steps for each pattern is ahead by {' and '.join(gaps)}"
        if thrice is not None:
            leads = [f"{thrice.means[k] - ast.means[k]:.1f}" for k in kinds]
            beside += f", and behind by {' and '.join(leads)} where ours has the steps of all three patterns"
    return [
        f"| Accuracy at equal cost | ResNet-8 on small CIFAR-10, mean of all sparse networks: {ours.sparse:.1f} %, the "
        f"paper's recipe {paper.sparse:.1f} %{beside} | [quality](quality.md) |"
    ]


def _steps() -> list[str]:
    from engine import pooled

    found = _read("engine") or {}
    ratios = sorted(pooled(r["rows"]) for key, r in found.items() if key.startswith("step ") and "rows" in r)
    if not ratios:
        return []
    return [
        f"| Training | a step takes {ratios[0]:.2f} to {ratios[-1]:.2f} times a dense one | [scaling](scaling.md) |"
    ]


def _killed() -> list[str]:
    found = _read("kill_test")
    if found is None:
        return []
    moments = found["moments"]
    same = sum(m["differs"] == [] for m in moments)
    return [
        f"| Stopping | of {len(moments)} runs killed and started again {same} ended with the same bytes as one left "
        "alone | [stopping](resuming.md) |"
    ]


def _fuzzed() -> list[str]:
    found = _read("bundle_fuzz")
    if found is None:
        return []
    return [
        f"| Damaged files | of {found['cases']:,} mutated bundles {len(found['failures'])} crashed the reader or were "
        "accepted as what they are not | [bundles](bundle-format.md#reading-and-writing) |"
    ]


def _large() -> list[str]:
    found = _read("inspect_large") or []
    told = [f"{r['model']} in {r['seconds']:.0f} s" for r in found]
    return (
        [f"| Looking at large models | {', '.join(told)} | [command line](command-line.md#inspect) |"] if told else []
    )
