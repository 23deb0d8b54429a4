"""AC/DC's phases: the whole network trains by turns dense and under one mask (Peste et al., NeurIPS 2021)."""

from __future__ import annotations

from bisect import bisect
from dataclasses import dataclass

from ...patterns.base import DENSE
from ..recipes.steps import Moment, Step, Turn

__all__ = ["Phases"]

CHANGES = (*(i / 100 for i in range(10, 80, 5)), 0.85)


@dataclass(frozen=True)
class Phases:
    """Dense and sparse phases in turn, a dense one first.

    A sparse phase begins with masks made from the weights as they are, outside which the weights become 0; a dense
    phase begins without what the optimizer kept. The dense network's weights are those that the last sparse phase began
    with.

    Attributes:
        changes: Where one phase ends and the next begins, as shares of the round's steps, ascending and odd in number
            (the last phase is sparse). By default those of AC/DC's 100 epochs on ImageNet: dense 0-9, then 5 and 5,
            dense 75-84, sparse 85-99.
    """

    changes: tuple[float, ...] = CHANGES

    def __call__(self, moment: Moment) -> Step:
        """The step at a moment."""
        changes = [min(round(share * moment.steps), moment.steps - 1) for share in self.changes]
        done = bisect(changes, moment.step)
        before = bisect(changes, moment.step - 1) if moment.step else 0
        sparse, begins = done % 2 == 1, done % 2 != before % 2
        if not sparse:
            return Step((Turn(DENSE),), forget=begins)
        turns = tuple(map(Turn, moment.names))
        last = done == len(changes) and before < done
        return Step(turns, prune=begins, keep=DENSE if last else None)
