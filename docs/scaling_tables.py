"""The tables of docs/scaling.md: what benchmarks/engine.py measured, and the arithmetic for a large model from it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "engine.json"

RANKS = 64
LAYERS, WIDTH, INNER, VOCABULARY, TOKENS = 32, 4096, 11008, 32000, 4096
"""Llama 2's 7 billion, and the tokens of one sequence, one of which each GPU trains on at a time."""

PRUNABLE = LAYERS * (4 * WIDTH**2 + 3 * WIDTH * INNER)
WEIGHTS = PRUNABLE + 2 * VOCABULARY * WIDTH + (2 * LAYERS + 1) * WIDTH
ELEMENTWISE, ROUNDS = 13, 10
"""Subnets with a mask of elements (10 unstructured, 3 N:M), and rounds."""

TRAINED = 10e9
"""Tokens of the whole run."""

PEAK_FLOPS, USED = 989e12, 0.4
GROUP = 1 << 26
"""Elements unpacked at a time on an accelerator."""


def scaling_block() -> str:
    """What was measured, then memory, traffic and time of the large run."""
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    return "\n".join([*_measured(results), *_memory(), *_traffic(), *_time(results)]) + "\n"


def _measured(results: dict[str, Any]) -> list[str]:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from engine import lines

    out = ["### Measured", "", "| what | measured | wanted |", "| --- | --- | --- |"]
    out += [
        f"| {what} | {figure}{'' if holds else ' (missed)'} | {limit.replace('<=', '≤').replace('>=', '≥')} |"
        for what, figure, limit, holds in lines(results)
    ]
    seen = {
        f"{e['machine']} with {e['cores']} cores (threads used: {e['threads']}"
        f"{', ' + e['device'] if e['device'] else ''}), torch {e['torch']}, cocktailsdk {e['cocktailsdk']}"
        for r in results.values()
        if (e := r.get("environment"))
    }
    loads = [r["environment"]["load"] for r in results.values() if "environment" in r]
    out += ["", f"On {'; '.join(sorted(seen))}."]
    if loads and max(loads) > 2:
        out += [
            f"Others used the machine meanwhile (load {min(loads)} to {max(loads)}): seconds are too long, and ratios "
            "of few turns provisional.",
        ]
    return [*out, ""]


def _gb(value: float) -> str:
    return f"{value / 1e9:.2f} GB"


def _memory() -> list[str]:
    n, p = WEIGHTS, PRUNABLE
    block = (4 * WIDTH**2 + 3 * WIDTH * INNER) * 2
    parts = [
        ("weights, float32", "4 N / 64", 4 * n / RANKS),
        ("gradients, float32", "4 N / 64", 4 * n / RANKS),
        ("Adam's two moments, float32", "8 N / 64", 8 * n / RANKS),
        ("**dense values of what is masked**", "4 P / 64", 4 * p / RANKS),
        ("**packed masks of the round's subnets**", "2 P / 8 / 64", 2 * p / 8 / RANKS),
        ("**masks unpacked, for a moment**", f"{GROUP / 1e6:.0f} M x (1 + 4)", GROUP * 5),
        ("two blocks gathered, bfloat16", "2 x 2 bytes", 2 * block),
        ("activations kept, one a block", "32 x 4096 x 4096 x 2", LAYERS * TOKENS * WIDTH * 2),
        ("logits and their gradient, float32", "2 x 4096 x 32000 x 4", 2 * TOKENS * VOCABULARY * 4),
    ]
    added = sum(size for name, _, size in parts if name.startswith("**"))
    total = sum(size for _, _, size in parts)
    return [
        "### Memory of one GPU",
        "",
        f"N = {n / 1e9:.2f} billion weights, P = {p / 1e9:.2f} billion of them prunable, 64 shards.",
        "",
        "| part | arithmetic | size |",
        "| --- | --- | --: |",
        *(f"| {name} | {how} | {_gb(size)} |" for name, how, size in parts),
        f"| together | | {_gb(total)} |",
        "",
        f"Co-training adds the three in bold, {_gb(added)} or {100 * added / (total - added):.0f} % of dense training. "
        f"All {ELEMENTWISE} masks of elements, packed, are {_gb(ELEMENTWISE * p / 8)} in the main memory of each "
        "process.",
        "",
    ]


def _traffic() -> list[str]:
    n = WEIGHTS
    whole = (RANKS - 1) / RANKS
    step = (2 + 2 + 4) * n * whole
    histograms = 2 * whole * 8 * ((1 << 15) + (1 << 16))
    return [
        "### Traffic of one GPU",
        "",
        "| when | arithmetic | bytes |",
        "| --- | --- | --: |",
        "| a step: weights gathered twice in bfloat16, gradients reduced in float32 | (2 + 2 + 4) N x 63/64 "
        f"| {_gb(step)} |",
        "| a sparse step on the dense step's batch, besides | masks are applied to shards | 0 |",
        f"| the paper's teacher pass, on sparse steps | 2 N x 63/64 | {_gb(2 * n * whole)} |",
        f"| ranking all weights, once a round | 2 x 63/64 x 8 (2^15 + 2^16) | {histograms / 1e6:.1f} MB |",
        f"| gathering all scores instead | 4 P x 63/64 | {_gb(4 * PRUNABLE * whole)} |",
        "",
    ]


def _time(results: dict[str, Any]) -> list[str]:
    dense = 6 * WEIGHTS * TRAINED / (RANKS * PEAK_FLOPS * USED) / 3600
    out = [
        "### Time",
        "",
        f"{TRAINED / 1e9:.0f} billion tokens at 6 N operations each, by 64 GPUs of {PEAK_FLOPS / 1e12:.0f} TFLOP/s "
        f"used to {100 * USED:.0f} %: 6 x {WEIGHTS / 1e9:.2f}e9 x {TRAINED:.0e} / (64 x {PEAK_FLOPS:.3g} x {USED}) = "
        f"{dense:.1f} hours of dense training.",
        "",
        "| part | arithmetic | hours |",
        "| --- | --- | --: |",
    ]
    from engine import pooled

    for recipe in ("paper-finishing", "paper"):
        keys = [f"{where}step {model} {recipe}" for where in ("gpu ", "") for model in ("vit", "resnet18")]
        key = next((k for k in keys if "rows" in results.get(k, {})), None)
        if key is not None:
            ratio = pooled(results[key]["rows"])
            out.append(f"| co-training, the ratio of `{key}` | {dense:.1f} x {ratio:.3f} | {dense * ratio:.1f} |")
    large = results.get("growth weights 1e9")
    if large:
        each = large["seconds"] / large["weights"]
        hours = ROUNDS * PRUNABLE / RANKS * each / 3600
        out.append(
            f"| masks of {ROUNDS} rounds, at one core's {1e9 * each:.1f} ns a weight | {ROUNDS} x P / 64 x "
            f"{1e9 * each:.1f} ns | {hours:.3f} |"
        )
    return [*out, ""]
