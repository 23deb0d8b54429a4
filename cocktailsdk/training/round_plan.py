"""The plan of a run: which subnets each round has, how their masks are made, and what each step trains."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from ..errors import TrainingError
from ..masks import Mask
from ..net.subnet_model import SubnetModel
from ..patterns.base import Subnet
from ..patterns.scoring import PatternScores
from .recipes import Pruning, Recipe, ScheduleContext, Step
from .recipes.steps import DENSE_STEP

__all__ = ["Plan", "names_until", "networks_of", "round_masks", "step_of"]

Plan = Sequence[Mapping[str, tuple[Subnet, ...]]]
"""The subnets of every round after the dense one, by pattern."""


def networks_of(net: SubnetModel, plan: Plan, round_: int) -> dict[str, tuple[str, ...]]:
    """Names of a round's subnets by pattern, in the net's order; none in round 0, all after the last (finishing)."""
    if round_ == 0:
        return {}
    if round_ > len(plan):
        return {p.name: tuple(s.name for s in p.subnets()) for p in net.patterns}
    return {p.name: tuple(s.name for s in plan[round_ - 1][p.name]) for p in net.patterns}


def names_until(net: SubnetModel, plan: Plan, last_round: int) -> list[str]:
    """Names of all distinct subnets of the rounds up to one, in the net's order."""
    trained = {s.name for row in plan[:last_round] for subnets in row.values() for s in subnets}
    return [name for name in net.names if name in trained]


def step_of(recipe: Recipe, context: ScheduleContext, last: int) -> Step:
    """The step that a recipe chooses.

    Args:
        recipe: Of the run.
        context: Where the run stands.
        last: Number of the last round before finishing.
    """
    if not any(context.subnets.values()):
        return DENSE_STEP
    schedule = recipe.step_schedule if context.round <= last else recipe.finishing_step_schedule
    return schedule(context)


def round_masks(
    recipe: Recipe,
    net: SubnetModel,
    plan: Plan,
    round_: int,
    load_dense: Callable[[], None],
    calibrate: Callable[[], PatternScores | None] | None = None,
) -> dict[str, Mask]:
    """Masks of the subnets that are new in a round, by the recipe's rule; they are not set.

    Args:
        recipe: Of the run.
        net: With the weights that the round before ended with.
        plan: The subnets of every round.
        round_: The round's number, from 1.
        load_dense: Loads the weights that the dense round ended with.
        calibrate: Judges the weights that are loaded; ``None`` where all patterns rank by magnitude.

    Raises:
        TrainingError: The rule makes others, or does not rank by the score.
    """
    new = frozenset(names_until(net, plan, round_)) - frozenset(names_until(net, plan, round_ - 1))
    judged: list[PatternScores | None] = []

    def scores() -> PatternScores | None:
        if calibrate is not None and not judged:
            judged.append(calibrate())
        return judged[0] if judged else None

    def load() -> None:
        judged.clear()  # other weights have other scores
        load_dense()

    masks = recipe.mask_rule(Pruning(net, plan[round_ - 1], new, load, scores))
    if new and calibrate is not None and not judged:
        raise TrainingError(
            f"recipe {recipe.name!r}: its mask rule does not rank by the run's score: call pruning.make_masks(subnet, "
            "previous) in it instead of net.make_masks, or leave score out"
        )
    if set(masks) != new:
        raise TrainingError(
            f"recipe {recipe.name!r}: its mask rule must make masks of {', '.join(sorted(new)) or 'nothing'} "
            f"in round {round_}, got {', '.join(sorted(masks)) or 'none'}"
        )
    return masks
