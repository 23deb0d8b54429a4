"""AST's turns: a network a mini-batch, masks that drop and regrow, corrected gradients (Yang et al., NeurIPS 2022)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ...patterns.base import DENSE
from ..recipes.steps import Moment, Step, Turn

__all__ = ["Alternating"]


@dataclass(frozen=True)
class Alternating:
    """The dense network and the round's subnets round robin, one a mini-batch.

    Every ``period`` turns of its own a subnet drops, in each layer, the smallest of its weights, and regrows as many
    where the gradient is largest.

    Attributes:
        regrow: Share of a layer's kept weights that are exchanged at first; it falls as a cosine.
        period: Turns of a subnet from one exchange to the next.
        until: Share of the round's steps after which masks stay as they are.
        correct: Whether, in every layer in which a gradient opposes the one before, its part along that is taken out.
    """

    regrow: float = 0.3
    period: int = 10
    until: float = 0.75
    correct: bool = True

    def __call__(self, moment: Moment) -> Step:
        """The step at a moment."""
        names = (DENSE, *moment.names)
        name, turn = names[moment.step % len(names)], moment.step // len(names)
        share, done = 0.0, moment.step / moment.steps
        if name != DENSE and turn and turn % self.period == 0 and done < self.until:
            share = self.regrow * (1 + math.cos(math.pi * done / self.until)) / 2
        return Step((Turn(name),), regrow=share, correct=self.correct)
