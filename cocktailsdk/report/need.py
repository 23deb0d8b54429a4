"""Which networks got the passes of a run, and which need them most, in one line."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from .numbers import percent_text

if TYPE_CHECKING:
    from ..training.events import NeedMeasured

__all__ = ["need_line", "needs"]


def needs(losses: Mapping[str, float | None], reference: float | None) -> dict[str, float]:
    """By network, how much its loss exceeds a reference; networks without a finite loss are left out.

    Args:
        losses: Held-out loss by network.
        reference: Loss of the dense network with the weights that the run started from.
    """
    if reference is None or not math.isfinite(reference):
        return {}
    return {name: loss - reference for name, loss in losses.items() if loss is not None and math.isfinite(loss)}


def need_line(event: NeedMeasured, patterns: Mapping[str, str]) -> str:
    """``passes: dense 20 %, channel 44 %, …; most in need: channel@0.651 (+1.9)``.

    Before the first pass, the shares of the next passes are shown.

    Args:
        event: The last measurement.
        patterns: Pattern by network.
    """
    given: Mapping[str, float] = event.passes if any(event.passes.values()) else event.shares
    total = sum(given.values())
    shares: dict[str, float] = {}
    for name, value in given.items():
        pattern = patterns.get(name, name)
        shares[pattern] = shares.get(pattern, 0.0) + value / total
    largest = sorted(shares.items(), key=lambda item: (item[0] != "dense", -item[1]))
    line = "passes: " + ", ".join(f"{pattern} {percent_text(share, 0)}" for pattern, share in largest)
    gaps = {name: gap for name, gap in needs(event.losses, event.reference).items() if name != "dense"}
    worst = max(gaps, key=lambda name: gaps[name], default=None)
    if worst is None or gaps[worst] <= 0:
        return line
    return f"{line}; most in need: {worst} ({gaps[worst]:+.2g})"
