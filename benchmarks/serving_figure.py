"""What ``benchmarks/serving.py`` found, as a picture.

python benchmarks/serving_figure.py        writes docs/assets/serving.png from benchmarks/results/serving.json
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
COLOURS = {"dense": "#D55E00", "switching": "#0072B2"}


def write_figure(found: Mapping[str, Any], path: Path) -> None:
    """Rate, latency, networks and accuracy over time."""
    from matplotlib.figure import Figure  # without pyplot, which keeps figures and a backend for the whole process

    figure = Figure(figsize=(8.4, 8.2), dpi=150, layout="constrained")
    rates, latency, networks, accuracy = figure.subplots(4, 1, sharex=True, height_ratios=(1, 1.4, 1.1, 1))
    _rates(rates, found)
    most = 0.0
    for name, run in found["runs"].items():
        rows = [r for r in run["windows"] if r["p95_ms"] is not None]
        most = max([most, *(r["p95_ms"] for r in rows)])
        latency.plot([r["at"] for r in rows], [r["p95_ms"] for r in rows], color=COLOURS[name], label=name)
    for name, run in found["runs"].items():
        lost = [r["at"] for r in run["windows"] if r["p95_ms"] is None]
        latency.plot(lost, [1.3 * most] * len(lost), "x", color=COLOURS[name], label=f"{name}: over 5 % failed")
    latency.axhline(found["goal_ms"], color="black", linestyle="--", linewidth=1, label="goal")
    latency.set(yscale="log", ylabel="95 % latency, ms")
    latency.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    names = [n["name"] for n in found["ladder"]]
    rows = found["runs"]["switching"]["windows"]
    bottom = [0.0] * len(rows)
    for k, name in enumerate(names):
        share = [r["networks"].get(name, 0) / max(1, sum(r["networks"].values())) for r in rows]
        shade = 0.15 + 0.75 * k / max(1, len(names) - 1)
        at = [r["at"] + found["window_s"] / 2 for r in rows]
        networks.bar(
            at,
            share,
            found["window_s"],
            bottom=bottom,
            color=(0.7 * (1 - shade), 0.3 + 0.6 * (1 - shade), 0.5 + 0.45 * (1 - shade)),
            label=name,
        )
        bottom = [b + s for b, s in zip(bottom, share, strict=True)]
    networks.set(ylabel="switching:\nanswered by", ylim=(0, 1))
    networks.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    for name, run in found["runs"].items():
        rows = [r for r in run["windows"] if r["examples"]]
        right = [100 * r["right"] / r["examples"] for r in rows]
        accuracy.plot([r["at"] for r in rows], right, color=COLOURS[name], label=name)
    accuracy.set(ylabel="accuracy of\nwhat was answered, %", xlabel="seconds")
    accuracy.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    for one in (rates, latency, networks, accuracy):
        one.grid(alpha=0.25)
        for side in ("top", "right"):
            one.spines[side].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _rates(axis: Any, found: Mapping[str, Any]) -> None:
    begins, times, values = 0.0, [], []
    for rate, seconds in found["steps"]:
        times += [begins, begins + seconds]
        values += [rate, rate]
        begins += seconds
    axis.plot(times, values, color="black", label="offered")
    axis.axhline(found["held"]["dense"], color=COLOURS["dense"], linestyle="--", linewidth=1, label="what dense holds")
    axis.set(ylabel="requests a second", ylim=(0, None))
    axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))


if __name__ == "__main__":
    write_figure(
        json.loads((HERE / "results" / "serving.json").read_text(encoding="utf-8")),
        HERE.parent / "docs" / "assets" / "serving.png",
    )
