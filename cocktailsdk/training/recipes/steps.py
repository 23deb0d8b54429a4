"""Step schedules: which subnetworks a mini-batch trains, and how.

A schedule is any function (or object with ``__call__``) from a :class:`ScheduleContext` to a :class:`Step`. A schedule
has no state, and draws from ``context.random``, so that a resumed run takes the same steps. A method that changes
masks, gradients or the optimizer between steps does so by hooks: see :mod:`cocktailsdk.training.step.hooks`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from ...moved import moved_names, renamed_fields
from ...patterns.base import DENSE

__all__ = [
    "DENSE_STEP",
    "SCHEDULES",
    "Pivot",
    "Sandwich",
    "ScheduleContext",
    "Single",
    "Step",
    "StepSchedule",
    "SubnetPass",
    "need",
    "rotation",
]

__getattr__ = moved_names(__name__, {"Moment": f"{__name__}.ScheduleContext", "Turn": f"{__name__}.SubnetPass"})


_HOOK = "write a cocktailsdk.training.StepHook, and name it in Recipe(hooks=...); docs/recipes.md has an example"


@renamed_fields(networks="subnets")
@dataclass(frozen=True)
class ScheduleContext:
    """What a schedule knows when it chooses a step.

    Attributes:
        round: Number of the round; 0 is the dense round, for which no schedule is called.
        step: Optimizer steps done in the round.
        steps: Optimizer steps of the round in all.
        subnets: The round's subnets by pattern, from the least sparse; patterns in the net's order.
        seed: The run's.
        due: By network, the dense one among them, the passes that it is owed by the recipe's
            :class:`~.allocation.PassAllocation`: below 0 if it had more than its share. Empty without an allocation.
    """

    round: int
    step: int
    steps: int
    subnets: Mapping[str, tuple[str, ...]]
    seed: int = 0
    due: Mapping[str, float] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """The round's subnets, pattern after pattern."""
        return tuple(name for names in self.subnets.values() for name in names)

    @property
    def random(self) -> random.Random:
        """A new generator, the same for the same seed, round and step."""
        return random.Random(f"{self.seed} {self.round} {self.step}")


@renamed_fields(network="subnet")
@dataclass(frozen=True)
class SubnetPass:
    """One subnetwork's forward and backward pass on the step's batch.

    Attributes:
        subnet: ``"dense"`` or a subnet's name. The dense network learns from the labels, a subnet also from the dense
            network's output, as the recipe's ``distill`` says.
        resolution: Side of the images as a share of the batch's own; the teacher sees them at full size.
    """

    subnet: str
    resolution: float = 1.0


@renamed_fields(dict.fromkeys(("prune", "keep", "forget", "regrow", "correct"), _HOOK), turns="passes")
@dataclass(frozen=True)
class Step:
    """One optimizer step; the gradients of its passes are added.

    The output of the dense network's pass teaches the passes after it, so that distilling costs no pass of its own.

    Attributes:
        passes: In order; at least one.
        leads: Whether, in a recipe with ``same_batch``, the step that follows may use this one's batch and outputs.
        follows: Whether this step may use those of the step before.
    """

    passes: tuple[SubnetPass, ...]
    leads: bool = False
    follows: bool = False

    @property
    def subnets(self) -> tuple[str, ...]:
        """The subnets that it trains, without the dense network."""
        return tuple(dict.fromkeys(one.subnet for one in self.passes if one.subnet != DENSE))


StepSchedule = Callable[[ScheduleContext], Step]

DENSE_STEP = Step((SubnetPass(DENSE),))


@dataclass(frozen=True)
class Pivot:
    """Dense pivot co-training (paper, section 3.2): dense, a subnet, dense, the next subnet, round robin.

    Patterns alternate; a pattern with several subnets goes through them round robin, one whenever it is its turn.

    Attributes:
        sparse: Sparse steps after every dense one; the paper's is 1. In a recipe with ``same_batch`` all of them are
            on the dense step's batch, and its outputs teach them.
    """

    sparse: int = 1

    def __call__(self, context: ScheduleContext) -> Step:
        """The step; dense where the round has no subnet to train."""
        patterns = [names for names in context.subnets.values() if names]
        if not patterns:
            return DENSE_STEP
        cycle, place = divmod(context.step, self.sparse + 1)
        if place == 0:
            return Step((SubnetPass(DENSE),), leads=True)
        number = cycle * self.sparse + place - 1  # of the sparse step, from 0
        names = patterns[number % len(patterns)]
        name = names[number // len(patterns) % len(names)]
        return Step((SubnetPass(name),), leads=place < self.sparse, follows=True)


def rotation(context: ScheduleContext) -> Step:
    """One network a mini-batch, the dense one among them, round robin (AST's order)."""
    names = (DENSE, *context.names)
    return Step((SubnetPass(names[context.step % len(names)]),))


@dataclass(frozen=True)
class Single:
    """The round's subnets alone, without the dense network (iterative magnitude pruning).

    Attributes:
        pattern: Only those of this pattern; ``None`` for all, in turn.
    """

    pattern: str | None = None

    def __call__(self, context: ScheduleContext) -> Step:
        """The step; dense where the round has no subnet to train."""
        names = context.names if self.pattern is None else context.subnets.get(self.pattern, ())
        return Step((SubnetPass(names[context.step % len(names)]),)) if names else DENSE_STEP


@dataclass(frozen=True)
class Sandwich:
    """The widest network, the narrowest of every pattern, and some in between, in one step (US-Net, MutualNet).

    Attributes:
        between: How many in between, drawn anew for every step.
        resolutions: Sides, as shares of the batch's own, drawn anew for every narrow network.
    """

    between: int = 2
    resolutions: tuple[float, ...] = (1.0,)

    def __call__(self, context: ScheduleContext) -> Step:
        """The step."""
        draw = context.random
        narrowest = [names[-1] for names in context.subnets.values() if names]
        rest = [name for name in context.names if name not in narrowest]
        chosen = [*narrowest, *draw.sample(rest, min(self.between, len(rest)))]
        return Step((SubnetPass(DENSE), *(SubnetPass(name, draw.choice(self.resolutions)) for name in chosen)))


def need(context: ScheduleContext) -> Step:
    """The network that is owed most passes; the first of several."""
    due = context.due
    return Step((SubnetPass(max(due, key=lambda name: due[name])),)) if due else DENSE_STEP


SCHEDULES: Mapping[str, StepSchedule] = {
    "pivot": Pivot(),
    "rotation": rotation,
    "single": Single(),
    "sandwich": Sandwich(),
    "need": need,
}
"""Schedules that a recipe may name."""
