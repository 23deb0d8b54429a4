"""A step of a loop of one's own, and which recipes such loops can follow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import TrainingError
from ..net.subnet_model import SubnetModel
from ..utils.blame import MISFITS, blamed
from ..utils.devices import device_of
from ..utils.nested import form_of, to_device
from .recipes import Recipe, Step, recipe_named
from .recipes.recipe import check_start
from .step.engine import ActivePass
from .step.execution import Execution

__all__ = ["LoopStep", "beyond", "dense_output_of", "recipe_for_loops"]


class LoopStep:
    """One step of a :class:`CoLoop`, or one of the batches that it accumulates.

    Attributes:
        network: Which network trains: ``"dense"`` or a subnet's name. It is active.
        round: The round.
        begins_round: Whether this is the round's first step: the trainer begins a new optimizer and schedule here.
        finishing: Whether the rounds are over, and all networks train together.
        plan: The recipe's step.
        dense_output: The dense network's output for the batch, where sparse steps learn from it.
    """

    def __init__(
        self,
        learned: Callable[..., Tensor],
        plan: Step,
        active: ActivePass,
        round_: int,
        first: bool,
        finishing: bool,
    ) -> None:
        self.network = active.subnet
        self.round, self.begins_round, self.finishing = round_, first, finishing
        self.plan, self.active, self._learned = plan, active, learned
        self.dense_output: Any = active.teacher
        self.loss_called = False

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
        self.loss_called = True
        return self._learned(self, loss, output, target)


def dense_output_of(net: SubnetModel, execution: Execution, batch: Any, found: bool) -> Any:
    """The dense network's output for a batch that ``CoLoop.step`` was given.

    Args:
        net: The networks; the dense one is active.
        execution: How passes run.
        batch: On any device.
        found: Whether how the batch is used was found, not given as ``forward_fn``.

    Raises:
        TrainingError: There is no batch, or the model does not take it.
    """
    if batch is None:
        raise TrainingError(
            "sparse steps learn from the dense network's output for the same batch: give it, `loop.step(batch)`; "
            "distill_weight=0 trains without"
        )
    blaming = blamed(
        "the model",
        lambda: f"on the batch that step() was given, which is {form_of(batch)}",
        "if the model takes such batches otherwise, give CoLoop a forward_fn(model, batch) -> (output, target)",
        MISFITS if found else (),
    )
    with torch.no_grad(), blaming:
        return execution.teacher(to_device(batch, device_of(net.model)))


def recipe_for_loops(recipe: str | Recipe, start: str) -> Recipe:
    """A recipe that a loop can follow, also by its name.

    Raises:
        TrainingError: It does what a loop cannot, or does not go with the start; says what.
    """
    recipe = recipe if isinstance(recipe, Recipe) else recipe_named(recipe)
    check_start(recipe, start)
    unclipped = replace(recipe, clip=None)  # the user's loop owns the gradients
    needs_trainer = {
        "merges its rounds": recipe.merges,
        "rewinds the weights": recipe.rewind and recipe.rounds == "levels",
        "keeps several sets of weights": recipe.weights == "own",
        "keeps statistics of every network while it trains": recipe.statistics == "separate",
        "keeps masked weights unchanged while the optimizer steps": recipe.update == "active",
        "changes learning rates": recipe.finishing_rate != 1,
        "has hooks, which change masks, gradients or the optimizer inside rounds": len(unclipped.step_hooks()) > 0,
    }
    for what, needed in needs_trainer.items():
        if needed:
            raise beyond(recipe, what)
    return recipe


def beyond(recipe: Recipe, what: str) -> TrainingError:
    """The error for what a recipe does beyond a loop."""
    return TrainingError(f"recipe {recipe.name!r} {what}: CoTrainer does that, CoLoop does not")
