"""AST: one network a mini-batch, masks that drop and regrow, corrected gradients (Yang et al., NeurIPS 2022)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from ...errors import TrainingError
from ...patterns.base import DENSE
from ..recipes.steps import ScheduleContext, Step, SubnetPass
from ..step.hooks import StepContext, StepHook
from .regrowth import correct_gradients, regrown

__all__ = ["Alternating"]


@dataclass(frozen=True)
class Alternating(StepHook):
    """The dense network and the round's subnets round robin, one a mini-batch.

    In every ``period``-th step of its own a subnet drops, in each layer, the smallest of its weights, and regrows as
    many where the gradient is largest.

    Attributes:
        regrow: Share of a layer's kept weights that are exchanged at first; it falls as a cosine.
        period: Steps of a subnet from one exchange to the next.
        until: Share of the round's steps after which masks stay as they are.
        correct: Whether, in every layer in which a gradient opposes the one before, its part along that is taken out.
    """

    regrow: float = 0.3
    period: int = 10
    until: float = 0.75
    correct: bool = True

    @cached_property
    def _previous(self) -> dict[str, Tensor]:
        """The gradients of the step before, by name: no field, as it is no setting of the method."""
        return {}

    @cached_property
    def _corrected(self) -> dict[str, Tensor]:
        """Those of this step, until it is made."""
        return {}

    def __call__(self, context: ScheduleContext) -> Step:
        """The step."""
        names = (DENSE, *context.names)
        return Step((SubnetPass(names[context.step % len(names)]),))

    def exchanged(self, context: ScheduleContext) -> float:
        """The share of each layer's kept weights that a step exchanges; 0 in most steps."""
        number, place = divmod(context.step, len(context.names) + 1)
        done = context.step / context.steps
        if not place or not number or number % self.period or done >= self.until:
            return 0.0
        return self.regrow * (1 + math.cos(math.pi * done / self.until)) / 2

    def on_round_start(self, context: ScheduleContext) -> None:
        """Forget the gradients of the round before."""
        self._previous.clear()

    def before_step(self, context: StepContext) -> None:
        """Refuse weights of which only a part is here."""
        if context.sharded and (self.correct or self.exchanged(context.schedule)):
            raise TrainingError("sharded weights (FSDP2) cannot regrow masks or correct gradients: train with DDP")

    def after_backward(self, context: StepContext, subnet: str) -> None:
        """Exchange weights, by the gradients that the masked ones have too."""
        if share := self.exchanged(context.schedule):
            context.set_mask(subnet, regrown(context.net, subnet, share))

    def before_update(self, context: StepContext) -> None:
        """Correct the gradients."""
        if self.correct:
            self._corrected.clear()  # of a skipped step, perhaps
            self._corrected.update(correct_gradients(context.gradients, self._previous))

    def after_update(self, context: StepContext) -> None:
        """Keep the gradients for the next step: those of a skipped step may not be finite."""
        self._previous.clear()
        self._previous.update(self._corrected)
        self._corrected.clear()

    def state_dict(self) -> dict[str, Any]:
        """The gradients of the step before, by the parameter's name."""
        return dict(self._previous)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self._previous.update(state)
