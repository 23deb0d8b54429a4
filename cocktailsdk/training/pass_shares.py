"""Shares of a run's passes while it trains: who is owed how many."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..patterns.base import DENSE
from .recipes import PassAllocation

__all__ = ["PassShares"]

DIGITS = 4
"""Decimals of a gap that count."""


class PassShares:
    """Gives out passes such that every network gets its share of them at any time (smooth weighted round robin).

    Every step adds each network's share to what it is owed, and takes 1 from the network that is trained. No random
    numbers are drawn, so that the same shares give the same order.

    Args:
        allocation: Of the recipe.
        subnets: The round's subnets by pattern, from the least sparse.
        steps: Optimizer steps of the round.

    Attributes:
        shares: By network, its share of the next passes.
        owed: By network, the passes that it is owed by now; below 0 if it had more than its share.
        batches: Held-out batches that gaps are measured on, once they are loaded.
    """

    def __init__(self, allocation: PassAllocation, subnets: Mapping[str, Sequence[str]], steps: int) -> None:
        self._allocation, self._subnets = allocation, subnets
        self.shares = allocation.shares(subnets, {})
        self.owed = dict.fromkeys(self.shares, 0.0)
        self._measured_steps = allocation.measured_steps(steps, len(self.shares))
        self.batches: list[Any] = []

    @property
    def examples(self) -> int:
        """How many held-out examples gaps are measured on."""
        return self._allocation.examples

    @property
    def measurements(self) -> int:
        """How often gaps are measured in the run."""
        return len(self._measured_steps)

    def due(self) -> dict[str, float]:
        """By network, what it is owed if one more pass is given out."""
        return {name: self.owed[name] + share for name, share in self.shares.items()}

    def is_due(self, step: int, measured: Sequence[Mapping[str, Any]]) -> bool:
        """Whether gaps are to be measured before a step.

        Args:
            step: Steps done in the round.
            measured: The measurements so far, as in ``History.measured``.
        """
        return step in self._measured_steps and not any(one["step"] == step for one in measured)

    def update(self, measured: Sequence[Mapping[str, Any]]) -> None:
        """Share the next passes by the last measurement. The first one's dense loss is what all others compare with."""
        if measured:
            reference, losses = measured[0]["losses"][DENSE], measured[-1]["losses"]
            self.shares = self._allocation.shares(self._subnets, _gaps(losses, reference))

    def give(self, names: Iterable[str]) -> None:
        """Count the passes of a step."""
        for trained in names:
            self.owed = self.due()
            self.owed[trained] = self.owed.get(trained, 0.0) - 1


def _gaps(losses: Mapping[str, float], reference: float) -> dict[str, float]:
    """How much worse each network is than the reference; one without a finite loss is as bad as the worst other."""
    # Rounded, or the last bits of losses, which differ between machines and numbers of processes, would break ties
    # between equal shares in another order.
    gaps = {name: round(loss - reference, DIGITS) for name, loss in losses.items()}
    worst = max((gap for gap in gaps.values() if math.isfinite(gap)), default=0.0)
    return {name: gap if math.isfinite(gap) else worst for name, gap in gaps.items()}
