"""AC/DC's phases: all weights train alternately dense and under one mask (Peste et al., NeurIPS 2021)."""

from __future__ import annotations

from bisect import bisect
from dataclasses import dataclass

from ...patterns.base import DENSE
from ..recipes.steps import DENSE_STEP, ScheduleContext, Step, SubnetPass
from ..step.hooks import StepContext, StepHook

__all__ = ["Phases"]

CHANGES = (*(i / 100 for i in range(10, 80, 5)), 0.85)


@dataclass(frozen=True)
class Phases(StepHook):
    """Dense and sparse phases alternate, a dense one first.

    A sparse phase begins with masks made from the weights as they are, outside which the weights become 0; a dense
    phase begins without the optimizer's state. The dense network's weights are those that the last sparse phase began
    with.

    Attributes:
        changes: Where one phase ends and the next begins, as shares of the round's steps, ascending and odd in number
            (the last phase is sparse). By default those of AC/DC's 100 epochs on ImageNet: dense 0-9, then 5 and 5,
            dense 75-84, sparse 85-99.
    """

    changes: tuple[float, ...] = CHANGES

    def phases(self, context: ScheduleContext) -> tuple[int, int]:
        """The phases of the step before and of a step, from 0; odd ones are sparse."""
        ends = [min(round(share * context.steps), context.steps - 1) for share in self.changes]
        return bisect(ends, context.step - 1) if context.step else 0, bisect(ends, context.step)

    def __call__(self, context: ScheduleContext) -> Step:
        """The step: the dense network in even phases, the round's subnet in odd ones."""
        _, now = self.phases(context)
        return Step(tuple(map(SubnetPass, context.names))) if now % 2 else DENSE_STEP

    def before_step(self, context: StepContext) -> None:
        """At the beginning of a phase: prune, or drop the optimizer's state."""
        before, now = self.phases(context.schedule)
        # in a short round phases may be empty, so that a sparse phase follows a sparse one: only the kind counts
        changes = now % 2 != before % 2
        if changes and not now % 2:
            context.drop_optimizer_state()
        if before < now == len(self.changes):
            context.snapshot_weights(DENSE)
        if changes and now % 2:
            for name in context.subnets:
                context.remake_masks([name])
                context.zero_masked_weights(name)
