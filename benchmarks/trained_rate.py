"""The exchange rate: how many passes alone a pass of a shared run is worth."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

Curve = Mapping[int, float]
"""Accuracy in % by passes alone. At 0 passes only the batch-norm statistics are recalibrated."""

CLOSE = 1.5
"""A subnetwork that is within so many points of alone with B before any training measures nothing."""


@dataclass(frozen=True)
class ExchangeRate:
    """An exchange rate and what it is made of.

    Attributes:
        rate: Mean passes alone, times the number of subnetworks, divided by the passes of the run.
        alone: By subnetwork, the passes that it needs alone to be as accurate as in the run.
        left_out: Subnetworks that are almost as accurate before any training.
        clipped: Subnetworks that are more accurate than any run alone, so that ``alone`` is a lower bound.
    """

    rate: float
    alone: Mapping[str, float]
    left_out: tuple[str, ...]
    clipped: tuple[str, ...]


def passes_alone(accuracy: float, curve: Curve) -> float:
    """The passes that a subnetwork needs alone to reach an accuracy, in [0, the most that were tried].

    A curve that never falls is fitted to the runs (isotonic regression) and is linear in the logarithm of passes. 0
    passes are put at 1, whose logarithm is 0.

    Args:
        accuracy: To be reached, in %.
        curve: Runs alone.
    """
    from sklearn.isotonic import IsotonicRegression

    passes = sorted(curve)
    x = np.array([math.log(max(p, 1)) for p in passes])
    y = IsotonicRegression().fit_transform(x, np.array([curve[p] for p in passes]))
    if accuracy <= y[0]:
        return 0.0
    if accuracy > y[-1]:
        return float(passes[-1])
    after = int(np.searchsorted(y, accuracy))  # the first that is as accurate: a plateau counts from where it begins
    before = after - 1
    share = (accuracy - y[before]) / (y[after] - y[before])
    return float(math.exp(x[before] + share * (x[after] - x[before])))


def exchange_rate(
    run: Mapping[str, float], passes: int, curves: Mapping[str, Curve], budget: int, subnetworks: int = 23
) -> ExchangeRate:
    """The exchange rate of a run.

    Args:
        run: Accuracy in % by subnetwork. Those without a curve do not count.
        passes: Student passes of the whole run.
        curves: Runs alone, by subnetwork: at 0 passes, at the budget, and at others.
        budget: B. Which subnetworks are left out depends on it.
        subnetworks: How many the run trains.

    Raises:
        ValueError: No subnetwork has a curve, or a curve lacks 0 passes or the budget.
    """
    measured = [name for name in curves if name in run]
    if lacking := [n for n in measured if not {0, budget} <= curves[n].keys()]:
        raise ValueError(f"the curve of {lacking[0]} needs runs alone with 0 and {budget} passes")
    left_out = tuple(n for n in measured if curves[n][0] > curves[n][budget] - CLOSE)
    alone = {n: passes_alone(run[n], curves[n]) for n in measured if n not in left_out}
    if not alone:
        raise ValueError(f"no subnetwork of the run has a curve that counts; left out: {', '.join(left_out) or 'none'}")
    clipped = tuple(n for n in alone if run[n] > max(curves[n].values()))
    return ExchangeRate(sum(alone.values()) / len(alone) * subnetworks / passes, alone, left_out, clipped)
