"""The deviation between the outputs of two networks."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["LIMITS", "deviation", "limit_for"]

# Several kernels with other orders of summation lie between: 1e-4 is about 1,000 roundings of float32, and float16 and
# bfloat16 keep 11 and 8 bits of mantissa.
LIMITS = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""The largest deviation that an export may have, by the narrowest dtype that the network computes in."""


def limit_for(dtypes: set[torch.dtype]) -> float:
    """The limit for a network whose tensors are of these dtypes."""
    return max((LIMITS[d] for d in dtypes if d in LIMITS), default=LIMITS[torch.float32])


def deviation(got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> tuple[float, float]:
    """The largest and the mean difference of any output, each relative to the largest and mean magnitude wanted.

    Infinite where names or shapes differ, or where one is finite and the other not. Whole numbers must be equal.
    """
    if set(got) != set(want):
        return float("inf"), float("inf")
    largest = mean = 0.0
    for name, w in want.items():
        g = got[name]
        if g.shape != w.shape:
            return float("inf"), float("inf")
        if not w.numel():
            continue
        if not w.is_floating_point():
            apart = 0.0 if torch.equal(g.to(w.dtype), w) else float("inf")
            largest, mean = max(largest, apart), max(mean, apart)
            continue
        g, w = g.double(), w.double()
        # Masked attention scores are -inf on purpose, so infinities are compared by place and not by difference.
        odd = ~w.isfinite()
        if bool((g.isfinite() == odd).any()):
            return float("inf"), float("inf")
        g, w = g[~odd], w[~odd]
        if w.numel():
            difference, size = (g - w).abs(), w.abs()
            # Relative to the output's magnitude, not element by element: a logit near zero has no relative precision.
            # The clamp avoids 0 / 0 for outputs of zeros.
            largest = max(largest, float(difference.max() / size.max().clamp_min(1e-30)))
            mean = max(mean, float(difference.mean() / size.mean().clamp_min(1e-30)))
    return largest, mean
