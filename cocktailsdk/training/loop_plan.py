"""Which step comes next in a loop of your own, the masks of its round, and whether a saved state is of this loop."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor
from torch import distributed as dist

from ..errors import TrainingError
from ..masks import Mask
from ..masks.packed import PackedMasks
from ..net.subnet_model import SubnetModel
from ..patterns.scoring import PatternScores
from ..utils.devices import device_of
from .budget import round_steps
from .distributed.ranks import ProcessRanks, digest
from .pass_shares import PassShares
from .recipes import Recipe, ScheduleContext, Step
from .recipes.steps import DENSE_STEP
from .round_plan import names_until, networks_of, round_masks, step_of
from .state.compatibility import Foreign, check_classes, check_masks
from .state.configuration import differences

__all__ = ["LoopPlan", "check_loop_state"]


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

    def __init__(self, net: SubnetModel, recipe: Recipe, steps: int, rounds: int | None, start: str, seed: int) -> None:
        if start not in ("scratch", "pretrained"):
            raise TrainingError(f'start must be "scratch" or "pretrained", got {start!r}')
        self._net, self._recipe, self._steps, self._seed = net, recipe, steps, seed
        self._plan = recipe.plan(net.patterns, rounds)
        self._first = 0 if start == "scratch" and recipe.rounds == "levels" else 1
        self._lengths = round_steps(steps, len(self._plan) + 1 - self._first, recipe.finishing)
        self.rounds, self.entered = len(self._plan), 0
        self._shares: PassShares | None = None
        self._given, self._last = -1, DENSE_STEP  # the step that was given out last, and its number

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
        if self._recipe.allocation is None:
            return step_of(self._recipe, context, self.rounds)
        if self._shares is None or done < self._given:
            self._shares, self._given = PassShares(self._recipe.allocation, subnets, context.steps), -1
        while self._given < done:  # passes are given out in order; after a state was loaded, from the first one
            self._given += 1
            context = replace(context, step=self._given, due=self._shares.due())
            self._last = step_of(self._recipe, context, self.rounds)
            self._shares.give(one.subnet for one in self._last.passes)
        return self._last

    def enter(self, round_: int, calibrate: Callable[[], PatternScores] | None = None) -> bool:
        """Make the masks of a round whose first step is about to begin; whether that was to be done.

        Args:
            round_: The round.
            calibrate: Judges the weights as they are; ``None`` where all patterns rank by magnitude.
        """
        if not self.entered < round_ <= self.rounds:
            return False
        net = self._net
        for name, mask in round_masks(self._recipe, net, self._plan, round_, _no_dense_round, calibrate).items():
            net.set_mask(name, mask)
        if calibrate is not None:
            _check_alike(net, self.names(round_))
        self.entered = round_
        return True


def _check_alike(net: SubnetModel, names: Iterable[str]) -> None:
    """See that several processes, each of which judged its own data, have the same masks.

    Raises:
        TrainingError: They have not.
    """
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        elements = {name: PackedMasks(net.masks[name].elements.items()).bits for name in names}
        units = {f"{name}/removed": m.removed for name in names if (m := net.masks[name]).removed is not None}
        ranks = ProcessRanks(device_of(net.model))
        ranks.verify("the calibration data, or the masks that are made from it,", lambda: digest({**elements, **units}))


def _no_dense_round() -> None:
    raise TrainingError("the mask rule wants the weights that the dense round ended with, which CoLoop does not keep")


def check_loop_state(state: Any, net: SubnetModel, configuration: Mapping[str, Any], total: int) -> dict[str, Mask]:
    """See that a state is one of a loop.

    Args:
        state: What is to be loaded.
        net: The loop's.
        configuration: The loop's.
        total: Its steps in all.

    Returns:
        The masks in it.

    Raises:
        TrainingError: It is not; says what differs.
    """
    if not isinstance(state, Mapping) or state.get("format") != 1:
        found = state.get("format") if isinstance(state, Mapping) else type(state).__name__
        raise TrainingError(f"this is no state of a CoLoop that this release reads: format {found!r}")
    kinds = {"configuration": Mapping, "masks": Mapping, "done": int, "entered": int}
    try:
        if wrong := [key for key, kind in kinds.items() if not isinstance(state.get(key), kind)]:
            raise Foreign(f"its {wrong[0]!r} is {type(state.get(wrong[0])).__name__}")
        if not 0 <= state["done"] <= total:
            raise Foreign(f"{state['done']} of {total} steps are done")
        check_classes(state.get("classes"))
        masks = check_masks(state["masks"], net)
        shapes = {n: t.shape for n, t in [*net.model.named_parameters(), *net.model.named_buffers()]}
        for name, value in state.get("teacher", {}).items():
            if not isinstance(value, Tensor) or shapes.get(name) != value.shape:
                raise Foreign(f"its teacher's {name!r:.40} does not fit the model")
    except Foreign as error:
        raise TrainingError(f"this is no state of a CoLoop: {error}") from error
    if lines := differences(state["configuration"], configuration):
        raise TrainingError(f"the state is of another loop ({'; '.join(lines)}): build the loop as it was")
    return masks
