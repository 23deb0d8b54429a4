"""Which step comes next in a loop of your own, and the masks of its round."""

from __future__ import annotations

from typing import Literal

from ..errors import TrainingError
from ..net.subnet_model import SubnetModel
from .budget import round_steps
from .recipes import Recipe, ScheduleContext, Step
from .round_plan import names_until, networks_of, round_masks, step_of

__all__ = ["LoopPlan"]


class LoopPlan:
    """The rounds of a loop and their lengths.

    Args:
        net: The networks.
        recipe: Of the loop.
        steps: Optimizer steps in all.
        rounds: Rounds after the dense one; ``None`` for the recipe's own number.
        start: ``"pretrained"`` skips the dense round.
        seed: Of what the schedule draws.

    Attributes:
        rounds: The number of the last round before finishing.
        entered: The last round whose masks are made.

    Raises:
        TrainingError: There is no such start, or there are too few steps.
    """

    def __init__(
        self,
        net: SubnetModel,
        recipe: Recipe,
        steps: int,
        rounds: int | None,
        start: Literal["scratch", "pretrained"],
        seed: int,
    ) -> None:
        if start not in ("scratch", "pretrained"):
            raise TrainingError(f'start must be "scratch" or "pretrained", got {start!r}')
        self._net, self._recipe, self._steps, self._seed = net, recipe, steps, seed
        self._plan = recipe.plan(net.patterns, rounds)
        self._first = 0 if start == "scratch" and recipe.rounds == "levels" else 1
        self._lengths = round_steps(steps, len(self._plan) + 1 - self._first, recipe.finishing)
        self.rounds, self.entered = len(self._plan), 0

    def names(self, last_round: int) -> list[str]:
        """Names of all distinct subnets of the rounds up to one."""
        return names_until(self._net, self._plan, last_round)

    def place(self, done: int) -> tuple[int, int]:
        """The round of the next step, and how many of its steps are done; after the last step, of that one.

        Args:
            done: Optimizer steps done.
        """
        number = min(done, self._steps - 1)
        for k, length in enumerate(self._lengths, self._first):
            if number < length:
                return k, number
            number -= length
        raise AssertionError("lengths add up to the total")

    def step(self, done: int) -> Step:
        """The next step.

        Raises:
            TrainingError: All steps are done.
        """
        if done >= self._steps:
            raise TrainingError(f"all {self._steps} steps are done: finish(), or build the loop with more steps")
        k, number = self.place(done)
        subnets = networks_of(self._net, self._plan, k)
        context = ScheduleContext(k, number, self._lengths[k - self._first], subnets, self._seed)
        return step_of(self._recipe, context, self.rounds)

    def enter(self, round_: int) -> bool:
        """Make the masks of a round whose first step is about to begin; whether that was to be done."""
        if not self.entered < round_ <= self.rounds:
            return False
        net = self._net
        masks = round_masks(self._recipe, net, self._plan[round_ - 1], self.names(round_ - 1), round_, _no_dense_round)
        for name, mask in masks.items():
            net.set_mask(name, mask)
        self.entered = round_
        return True


def _no_dense_round() -> None:
    raise TrainingError("the mask rule wants the weights that the dense round ended with, which CoLoop does not keep")
