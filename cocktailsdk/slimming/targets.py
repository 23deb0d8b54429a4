"""Shares of FLOPs or parameters that may be left, in place of a ratio."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from jaxtyping import Bool
from torch import Tensor

from ..errors import PatternError
from ..patterns.unit_choice import Choice

__all__ = ["Target"]

log = logging.getLogger(__name__)

NUDGE = 1e-9
"""Either side of a step: ``round`` turns halves to even, so a step may lie on either side of it."""


@dataclass(frozen=True)
class Target:
    """What may be left, as shares of the whole; ``None`` for any.

    Raises:
        PatternError: A share is not in (0, 1].
    """

    flops: float | None = None
    params: float | None = None

    def __post_init__(self) -> None:
        for name, share in (("flops", self.flops), ("params", self.params)):
            if share is not None and (
                isinstance(share, bool) or not isinstance(share, int | float) or not 0.0 < share <= 1.0
            ):
                raise PatternError(f"{name} is the share that may be left, a number in (0, 1], not {share!r}")

    def __bool__(self) -> bool:
        return self.flops is not None or self.params is not None

    def meet(self, choice: Choice) -> Bool[Tensor, " units"]:
        """The units that go when the ratios are multiplied by the smallest factor that meets the target.

        Found by bisection over the factors at which some pool loses one more unit.

        Raises:
            PatternError: It cannot be met.
        """
        coupling = choice.coupling
        dense_flops, dense_params = coupling.flops(), coupling.params()

        def shares(removed: Tensor) -> tuple[float, float]:
            return (
                coupling.flops(removed) / dense_flops if self.flops is not None and dense_flops else 0.0,
                coupling.params(removed) / dense_params if self.params is not None and dense_params else 0.0,
            )

        def meets(removed: Tensor) -> bool:
            f, p = shares(removed)
            return (self.flops is None or f <= self.flops) and (self.params is None or p <= self.params)

        steps = _steps(choice)
        if not meets(most := choice.removed(steps[-1])):
            f, p = shares(most)
            asked = [
                f"{n}={a} (at least {h:.4f} stays)"
                for n, a, h in (("flops", self.flops, f), ("params", self.params, p))
                if a is not None
            ]
            groups = sum(len(pool.groups) for pool in choice.pools if pool.ratio > 0.0)
            raise PatternError(
                f"cannot be met: {', '.join(asked)}, even with the fewest units that round_to and min_width let stay "
                f"in each of the {groups} groups that ratio narrows"
            )
        low, high = 0, len(steps) - 1
        while low < high:
            middle = (low + high) // 2
            if meets(choice.removed(steps[middle])):
                high = middle
            else:
                low = middle + 1
        log.info("the ratios times %.6g meet %s", steps[low], self)
        return choice.removed(steps[low])


def _steps(choice: Choice) -> list[float]:
    """Factors, ascending, between which nothing changes."""
    steps = {0.0}
    for n, ratio in {(sum(g.size for g in p.groups), p.ratio) for p in choice.pools if p.ratio > 0.0}:
        steps |= {min((k + 0.5) / n + e, 1.0) / ratio for k in range(n) for e in (-NUDGE, 0.0, NUDGE)}
    return sorted(steps)
