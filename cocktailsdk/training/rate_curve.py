"""What the curve of a learning-rate range test says: the best rate, if the loss fell, and the last that harms none."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["RateCurve", "best_rate", "smoothed"]

VALLEY = 0.2
"""Share of the whole decrease that the loss may be above its minimum within the valley."""
CLEAR = 0.05
"""The loss has fallen if it is lower by such a share of that at the start: below, tests of two seeds disagree."""
NOISE = 3.0
"""And lower by so many standard deviations of a single measurement."""
RISEN = 0.1
"""A loss has risen if it is higher by such a share of that at the start, …"""
RISEN_OF_MEAN = 0.2
"""… and by such a share of the mean loss at the start: the dense network's own is nearly 0 beside its teacher.

It rises at every useful rate, and falls again as the rate decays in a run. With a share of 0.02, suggestions were 10
times below the best rates of a grid, and with 0.2 up to 3 times. It keeps clear harm away, but does not bound points
of accuracy: a small vision transformer may lose more than half a point at the rates that it allows.
"""


@dataclass(frozen=True)
class RateCurve:
    """Losses while the learning rate rises.

    Attributes:
        before: The mean loss of the measured networks before the first step.
        dense_before: The dense network's loss before the first step.
        rates: Rising.
        losses: The mean loss after the step at each rate.
        dense: The dense network's loss after the step at each rate.
    """

    before: float
    dense_before: float
    rates: tuple[float, ...]
    losses: tuple[float, ...]
    dense: tuple[float, ...]

    def safe_until(self) -> float | None:
        """The last rate before the mean loss, or that of the dense network, has clearly risen; ``None``: none is."""
        base = RISEN_OF_MEAN * abs(self.before)
        limits = [start + max(RISEN * abs(start), base) for start in (self.before, self.dense_before)]
        safe = None
        for rate, *losses in zip(self.rates, smoothed(self.losses), smoothed(self.dense), strict=True):
            if any(loss > limit for loss, limit in zip(losses, limits, strict=True)):
                break
            safe = rate
        return safe

    def suggestion(self, own: float) -> tuple[float, bool, bool] | None:
        """The rate to train with.

        It is the middle of the valley, or the largest safe rate below it at which the loss had clearly fallen. Where
        there is none, it is the optimizer's own, or the largest safe rate below that.

        Args:
            own: The rate that the optimizer has.

        Returns:
            The rate, whether the loss fell, and whether the rate is lower than it would be but for safety. ``None``
            if no rate is safe.
        """
        safe = self.safe_until()
        if safe is None:
            return None
        best = best_rate(self.rates, self.losses, self.before)
        if best is not None:
            if best <= safe:
                return best, True, False
            ceiling = self.before - CLEAR * abs(self.before)
            pairs = zip(self.rates, smoothed(self.losses), strict=True)
            fallen = [rate for rate, loss in pairs if loss <= ceiling and rate <= safe]
            if fallen:
                return fallen[-1], True, True
        return min(own, safe), False, safe < own


def best_rate(rates: Sequence[float], losses: Sequence[float], before: float) -> float | None:
    """The middle of the valley of the smoothed curve: the geometric mean of its two edges.

    The edges are where the loss has fallen by 80 % of all that it falls. Measured on six pairs of model and optimizer,
    26 curves of 24 to 120 steps, against the best rate of a grid of runs of 120 steps. On average the suggestion was
    off by a factor of 1.5, at worst by 3.1. The minimum of the smoothed curve was as good, but depends on one point.
    A quarter of it was off by 5, a tenth by 13, the steepest slope by 8, and "valley" (fastai, Lightning) by 6, always
    downwards but for the slope. Those rules are for training losses, whose minimum lags behind the rate.

    Args:
        rates: Rising.
        losses: After the step at each rate.
        before: The loss before the first step.

    Returns:
        ``None`` if the loss does not clearly fall: by 5 % and by three standard deviations of a measurement.
    """
    smooth = smoothed(losses)
    lowest = min(smooth, default=math.inf)
    if not before - lowest >= CLEAR * abs(before) or not lowest < before:
        return None
    bottom = smooth.index(lowest)
    if before - lowest < NOISE * _deviation(losses[: bottom + 3], smooth[: bottom + 3]):
        return None
    inside = [loss <= lowest + VALLEY * (before - lowest) for loss in smooth]
    left = right = bottom
    while left > 0 and inside[left - 1]:
        left -= 1
    while right + 1 < len(inside) and inside[right + 1]:
        right += 1
    return math.sqrt(rates[left] * rates[right])


def smoothed(losses: Sequence[float]) -> list[float]:
    """Means of five medians of three: single outliers count for nothing, and the ends are means of fewer."""
    medians = [statistics.median(losses[max(0, i - 1) : i + 2]) for i in range(len(losses))]
    return [statistics.fmean(medians[max(0, i - 2) : i + 3]) for i in range(len(medians))]


def _deviation(losses: Sequence[float], smooth: Sequence[float]) -> float:
    """The standard deviation of a measurement, from the median distance to the smoothed curve."""
    return 1.4826 * statistics.median(abs(a - b) for a, b in zip(losses, smooth, strict=True))
