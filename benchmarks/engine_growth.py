"""How the cost of masks grows with patterns and with levels."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from engine_umg import exponent, layers, made_of, mask_bytes, ours, timed

from cocktailsdk.masks import Mask
from cocktailsdk.patterns import NM, Block, Channel, Pattern, Transposable, Unstructured, Vector


def pattern_costs(size: str) -> dict[str, Any]:
    """Seconds of a round by the number of patterns: for each number the mean over which of six they are."""
    six: list[Pattern] = [
        Unstructured([0.5]), NM(2, 4), Channel([0.5], round_to=1), Block((4, 4), [0.5]), Vector(4, [0.5]),
        Transposable(2, 4),
    ]  # fmt: skip
    umg = made_of(layers(size), torch.float32)
    alone: dict[str, float] = {}
    for pattern in six:
        ours(umg, {}, [pattern])  # what is loaded at the first use
        alone[pattern.name] = min(timed(lambda p=pattern: ours(umg, {}, [p]))[1] for _ in range(3))
    rows = []
    for k in range(1, len(six) + 1):
        cost = held = 0.0
        for begin in range(len(six)):
            _, processor, made = timed(lambda k=k, b=begin: ours(umg, {}, (six * 2)[b : b + k]))
            cost += processor / len(six)
            held += mask_bytes(made) / len(six)
        rows.append({"patterns": k, "seconds": cost, "bytes": held})
    counts = [r["patterns"] for r in rows]
    return {"alone": alone, "rows": rows, "exponents": {"seconds": exponent(counts, [r["seconds"] for r in rows])}}


def level_costs(size: str, counts: list[int]) -> dict[str, Any]:
    """Seconds of all masks of a run by its rounds: three patterns, each mask nested in the one before."""
    umg = made_of(layers(size), torch.float32)
    rows = []
    for rounds in counts:
        levels = [
            (Unstructured([1 - 0.9**k]), NM(2, 4), Channel([1 - 0.95**k], round_to=1)) for k in range(1, rounds + 1)
        ]

        def run(levels: list[Any] = levels) -> None:
            last: dict[str, Mask] = {}
            for patterns in levels:
                last = ours(replace(umg), last, patterns)

        wall, processor, _ = timed(run)
        rows.append({"rounds": rounds, "seconds": processor, "wall": wall})
    return {"rows": rows, "exponents": {"seconds": exponent(counts, [r["seconds"] for r in rows])}}
