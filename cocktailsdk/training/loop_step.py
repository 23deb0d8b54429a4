"""A step of a loop of one's own, and which recipes such loops can follow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jaxtyping import Float
from torch import Tensor

from ..errors import TrainingError
from .recipes import Recipe, Step

__all__ = ["LoopStep", "beyond", "needs_trainer"]


class LoopStep:
    """One step of a :class:`CoLoop`, or one of the batches that it accumulates.

    Attributes:
        network: Which network trains: ``"dense"`` or a subnet's name. It is active.
        round: The round.
        begins_round: Whether this is the round's first step: the trainer begins a new optimizer and schedule here.
        finishing: Whether the rounds are over, and all networks train together.
    """

    def __init__(self, learned: Callable[..., Tensor], step: Step, round_: int, first: bool, finishing: bool) -> None:
        self.network = step.turns[0].network
        self.round, self.begins_round, self.finishing = round_, first, finishing
        self.teacher: Any = None
        self.said: Any = None
        self.asked = False
        self.leads, self._learned = step.leads, learned

    def loss(self, loss: Float[Tensor, ""], output: Any, target: Any = None) -> Float[Tensor, ""]:
        """What to call ``backward()`` on: on sparse steps the loss and that against the dense network's output.

        Args:
            loss: Yours, a mean over the batch's examples.
            output: The model's: class logits, or what holds them as ``.logits``, ``["logits"]`` or first of a tuple;
                whatever ``distill_fn`` takes where there is one.
            target: The batch's integer labels; not needed with a ``distill_fn``.

        Returns:
            ``loss`` itself on dense steps and without distillation.

        Raises:
            TrainingError: There is nothing to distil: the outputs are no classification and there is no ``distill_fn``.
        """
        self.asked = True
        return self._learned(self, loss, output, target)


def needs_trainer(recipe: Recipe) -> str | None:
    """What a recipe does that a loop cannot; ``None`` where there is nothing."""
    if recipe.merges:
        return "merges its rounds"
    if recipe.rewind and recipe.rounds == "levels":
        return "rewinds the weights"
    if recipe.weights == "own":
        return "keeps several sets of weights"
    if recipe.statistics == "separate":
        return "keeps statistics of every network while it trains"
    if recipe.update == "active":
        return "holds masked weights while the optimizer steps"
    if recipe.finishing_rate != 1:
        return "changes learning rates"
    return None


def beyond(recipe: Recipe, what: str) -> TrainingError:
    """The error for what a recipe does beyond a loop."""
    return TrainingError(f"recipe {recipe.name!r} {what}: CoTrainer does that, CoLoop does not")
