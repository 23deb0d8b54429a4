"""Step schedules: which networks a mini-batch trains, and how.

A schedule is any function (or object with ``__call__``) from a :class:`Moment` to a :class:`Step`. It keeps no state:
what it draws comes from the moment's own generator, so that a run that was stopped goes on identically.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ...patterns.base import DENSE

__all__ = [
    "DENSE_STEP",
    "SCHEDULES",
    "Moment",
    "Pivot",
    "Sandwich",
    "Single",
    "Step",
    "StepSchedule",
    "Turn",
    "rotation",
]


@dataclass(frozen=True)
class Moment:
    """Where a run stands when a step is to be chosen.

    Attributes:
        round: Number of the round; 0 is the dense one, which asks no schedule.
        step: Optimizer steps done in the round.
        steps: Of how many.
        networks: The round's subnets by pattern, from the least sparse; patterns in the net's order.
        seed: The run's.
    """

    round: int
    step: int
    steps: int
    networks: Mapping[str, tuple[str, ...]]
    seed: int = 0

    @property
    def names(self) -> tuple[str, ...]:
        """The round's subnets, pattern after pattern."""
        return tuple(name for names in self.networks.values() for name in names)

    @property
    def random(self) -> random.Random:
        """A new generator, the same for the same seed, round and step."""
        return random.Random(f"{self.seed} {self.round} {self.step}")


@dataclass(frozen=True)
class Turn:
    """One network's forward and backward pass on the step's batch.

    Attributes:
        network: ``"dense"`` or a subnet's name. The dense network learns from the labels, a subnet also from the dense
            network, as the recipe's ``distill`` says.
        resolution: Side of the images as a share of the batch's own; the teacher sees them whole.
    """

    network: str
    resolution: float = 1.0


@dataclass(frozen=True)
class Step:
    """One optimizer step; gradients of its turns are added.

    What the dense network says in its turn teaches the turns after it, so that distilling costs no pass of its own.

    Attributes:
        turns: In order; at least one.
        leads: Whether, in a recipe with ``same_batch``, the step that follows may use this one's batch and outputs.
        follows: Whether this step may use those of the step before.
        prune: Whether first the masks of its networks are made anew from the weights as they are, each for itself, and
            the weights outside become 0.
        keep: A network that first gets the weights as they are for its own.
        forget: Whether first all that the optimizer keeps (momentum, say) is dropped.
        regrow: Share of each layer's kept weights that its networks drop and regrow by gradient.
        correct: Whether the part of each layer's gradient that opposes the step before's is taken out.
    """

    turns: tuple[Turn, ...]
    leads: bool = False
    follows: bool = False
    prune: bool = False
    keep: str | None = None
    forget: bool = False
    regrow: float = 0.0
    correct: bool = False


StepSchedule = Callable[[Moment], Step]

DENSE_STEP = Step((Turn(DENSE),))


@dataclass(frozen=True)
class Pivot:
    """Dense pivot co-training (paper, section 3.2): dense, a subnet, dense, the next subnet, in turn.

    Patterns take turns; one with several subnets takes them in turn, one each time that the pattern has its own.

    Attributes:
        sparse: Sparse steps after every dense one; the paper's is 1. In a recipe with ``same_batch`` all of them are
            on the dense step's batch, and its outputs teach them.
    """

    sparse: int = 1

    def __call__(self, moment: Moment) -> Step:
        """The step at a moment; dense where the round has no subnet to train."""
        patterns = [names for names in moment.networks.values() if names]
        if not patterns:
            return DENSE_STEP
        cycle, place = divmod(moment.step, self.sparse + 1)
        if place == 0:
            return Step((Turn(DENSE),), leads=True)
        turn = cycle * self.sparse + place - 1
        names = patterns[turn % len(patterns)]
        return Step((Turn(names[turn // len(patterns) % len(names)]),), leads=place < self.sparse, follows=True)


def rotation(moment: Moment) -> Step:
    """One network a mini-batch, the dense one among them, round robin (AST's turns)."""
    names = (DENSE, *moment.names)
    return Step((Turn(names[moment.step % len(names)]),))


@dataclass(frozen=True)
class Single:
    """The round's subnets alone, without the dense network (iterative magnitude pruning).

    Attributes:
        pattern: Only those of this pattern; ``None`` for all, in turn.
    """

    pattern: str | None = None

    def __call__(self, moment: Moment) -> Step:
        """The step at a moment; dense where the round has no subnet to train."""
        names = moment.names if self.pattern is None else moment.networks.get(self.pattern, ())
        return Step((Turn(names[moment.step % len(names)]),)) if names else DENSE_STEP


@dataclass(frozen=True)
class Sandwich:
    """The widest network, the narrowest of every pattern, and some in between, in one step (US-Net, MutualNet).

    Attributes:
        between: How many in between, drawn anew for every step.
        resolutions: Sides, as shares of the batch's own, drawn anew for every narrow network.
    """

    between: int = 2
    resolutions: tuple[float, ...] = (1.0,)

    def __call__(self, moment: Moment) -> Step:
        """The step at a moment."""
        draw = moment.random
        narrowest = [names[-1] for names in moment.networks.values() if names]
        rest = [name for name in moment.names if name not in narrowest]
        chosen = [*narrowest, *draw.sample(rest, min(self.between, len(rest)))]
        return Step((Turn(DENSE), *(Turn(name, draw.choice(self.resolutions)) for name in chosen)))


SCHEDULES: Mapping[str, StepSchedule] = {
    "pivot": Pivot(),
    "rotation": rotation,
    "single": Single(),
    "sandwich": Sandwich(),
}
"""Schedules that a recipe may name."""
