"""The tables of docs/detection.md: what benchmarks/detection.py, detection_costs.py and detection_parts.py found."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from cocktailsdk.report.numbers import count_text, flops_text

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
KIND_TITLES = {"bbox": "box", "segm": "mask"}
HEADER = ("method", "seeds", "steps", "passes", "dense (AP50)")


def detection_block() -> str:
    """Methods beside each other, then what slim detectors cost, then the parts of each detector."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    return "\n".join(block for block in (_methods_block(), _costs_block(), _parts_block()) if block)


def _methods_block() -> str:
    """For each task and kind a line a method, with the paper's gap beside."""
    from detection_rows import KINDS, TASKS, lines, paper_gap, read

    rows = read(RESULTS / "detection.json")
    if not rows:
        return ""
    out = ["### Measured", ""]
    for name, task in TASKS.items():
        for kind, title in KIND_TITLES.items():
            mine = [x for x in lines(rows) if (x.task, x.kind) == (name, kind)]
            if not mine:
                continue
            out += [
                f"**{task.title}**: {title} AP on the test set; the paper's gap is with {task.paper} on COCO (its "
                "Table 4).",
                "",
                f"| {' | '.join((*HEADER, *KINDS))} | gap | paper's gap | minutes |",
                "| --- | --: | --: | --: | --: |" + " --: |" * (len(KINDS) + 3),
            ]
            for x in mine:
                paper = paper_gap(x.kind, task.paper, x.method)
                gap = f"{x.gap:.1f}" + ("" if x.spread is None else f" ± {x.spread:.1f}")
                cells = [f"`{x.method}`", x.seeds, x.steps, x.passes, f"{x.dense:.1f} ({x.dense50:.1f})"]
                cells += ["" if x.means[k] is None else f"{x.means[k]:.1f}" for k in KINDS]
                cells += [gap, "" if paper is None else f"{paper:.1f}", f"{x.seconds / 60:.0f}"]
                out.append("| " + " | ".join(map(str, cells)) + " |")
            out.append("")
        here = [row for row in rows if row["task"] == name]
        if here:
            commands = sorted({row["command"].partition(" --method")[0] for row in here}, key=len)
            out += [
                f"Commands: {', '.join(f'`{c}`' for c in commands)}. {sorted({row['machine'] for row in here})[0]}.",
                "",
            ]
    return "\n".join(out)


def _costs_block() -> str:
    """For each detector a line for every slim network that was timed."""
    from result_rows import read_rows

    rows = read_rows(RESULTS / "detection_costs.json")
    if not rows:
        return ""
    _, height, width = rows[0]["image"]
    out = [
        "### Costs",
        "",
        f"`python benchmarks/detection_costs.py`: one image of {height} x {width}, times as fast as the dense "
        f"one, by turns, {rows[0]['machine']}. Proposals and what is done with them take as long in a slim detector. "
        "In torch the whole detector, in onnxruntime what can be written as ONNX.",
        "",
        "| detector | dense | network | parameters | FLOPs | torch | onnxruntime |",
        "| --- | --: | --- | --: | --: | --: | --: |",
    ]
    for row in rows:
        dense = f"{flops_text(row['dense_flops'])}, {count_text(row['dense_parameters'])}"
        cells = [row["detector"], dense, f"`{row['network']}`"]
        cells += [f"{100 * row['parameters']:.0f} %", f"{100 * row['flops']:.0f} %", f"{row['times_as_fast']:.2f}"]
        cells.append(f"{row['onnx_times_as_fast']:.2f} ({row['onnx_part']})")
        out.append("| " + " | ".join(cells) + " |")
    return "\n".join([*out, ""])


def _parts_block() -> str:
    """For each detector what can be pruned in its parts, and what stays whole and why."""
    path = RESULTS / "detection_parts.json"
    if not path.is_file():
        return ""
    out = ["### Parts", "", "`python benchmarks/detection_parts.py`:", ""]
    for title, found in json.loads(path.read_text(encoding="utf-8")).items():
        out += [
            f"**{title}**",
            "",
            "| part | parameters | maskable | channels that can go | stays whole |",
            "| --- | --: | --: | --- | --- |",
        ]
        for part in found["parts"]:
            share = f"{100 * part['maskable'] / max(part['parameters'], 1):.0f} %"
            channels = f"{part['channels']} in {part['groups']} groups" if part["groups"] else "none"
            why = "; ".join(f"{', '.join(f'`{n}`' for n in names)}: {why}" for why, names in part["kept"].items())
            cells = [f"`{part['name']}`", count_text(part["parameters"]), share, channels, why.replace("|", "/")]
            out.append("| " + " | ".join(cells) + " |")
        out.append("")
    return "\n".join(out)
