"""From the trainer's arguments to what the run does: lengths of loaders, and epochs or steps of every round."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from ..utils.nested import default_forward
from .budget import Division, divide_steps, finishing_epochs, rewind_epoch_of
from .data.loader_state import epoch_length, loader_length
from .distributed.launch import Launch, accumulated, precision_of
from .distributed.ranks import Ranks
from .distributed.sharing import held_out_loader, shared_loader
from .options import Options, default_optimizer
from .round_plan import Plan
from .schedules import cosine_restarts
from .trainer_arguments import TrainerArguments

__all__ = ["Loaders", "build_options", "with_epochs"]

PAPER_EPOCHS = 150
"""Epochs of a round in the paper (CIFAR-10), where neither epochs nor a budget are given."""


@dataclass(frozen=True)
class Loaders:
    """The run's loaders, and how much of them makes an epoch.

    Attributes:
        train: As the user gave it.
        shared_train: What this process loads of it: all, where it is alone.
        held_out: ``val_loader`` as the user gave it.
        shared_held_out: The same of it.
        epoch_batches: Training batches of an epoch, the same in all processes.
        pass_length: Batches of a pass over ``train``; ``None`` where it cannot say.
    """

    train: Iterable[Any]
    shared_train: Iterable[Any]
    held_out: Iterable[Any] | None
    shared_held_out: Iterable[Any] | None
    epoch_batches: int
    pass_length: int | None

    @classmethod
    def of(cls, arguments: TrainerArguments, ranks: Ranks) -> Loaders:
        """Measure the loaders; all processes must call this together."""
        train, held_out, batches = arguments.train_loader, arguments.val_loader, arguments.settings.batches
        epoch_batches = ranks.least(epoch_length(train, batches.steps_per_epoch))
        pass_length: int | None = epoch_batches
        if batches.steps_per_epoch is not None:
            pass_length = ranks.least(loader_length(train) or 0) or None
        shared_held_out = None if held_out is None else held_out_loader(held_out, ranks)
        shared_train = shared_loader(train, ranks, batches.shard_loader)
        return cls(train, shared_train, held_out, shared_held_out, epoch_batches, pass_length)


def build_options(
    arguments: TrainerArguments, plan: Plan, loaders: Loaders, launch: Launch, resumed_epochs: int | None
) -> Options:
    """What a run does.

    A budget of hours is turned into epochs once a step can be measured: until then there is one epoch, and
    :func:`with_epochs` sets the number.

    Args:
        arguments: The trainer's.
        plan: The subnets of every round.
        loaders: The run's.
        launch: The processes and their devices.
        resumed_epochs: Epochs of the run that is resumed under the same budget of hours, if any.

    Raises:
        TrainingError: Arguments do not fit each other, the loaders or the recipe.
    """
    settings, recipe = arguments.settings, arguments.named_recipe
    size = accumulated(launch, settings.execution.gradient_accumulation_steps)
    steps_per_epoch = -(-loaders.epoch_batches // size)
    division = _division(arguments, plan, steps_per_epoch, resumed_epochs)
    return Options(
        recipe=recipe,
        loss_fn=arguments.loss_fn,
        forward_fn=settings.batches.forward_fn or default_forward,
        distill_fn=settings.distillation.loss_fn,
        distill_weight=settings.distillation.weight,
        metric=arguments.metric,
        metric_mode=settings.evaluation.metric_mode,
        optimizer=arguments.optimizer or default_optimizer(arguments.start),
        schedule=arguments.schedule or cosine_restarts(),
        epochs=division.epochs,
        finishing_epochs=division.finishing_epochs,
        budget=division.budget,
        total_hours=arguments.total_hours,
        rewind_epoch=division.rewind_epoch,
        rewind_schedule=settings.rounds.rewind_schedule,
        rounds=len(plan),
        steps_per_epoch=steps_per_epoch,
        gradient_accumulation_steps=size,
        pass_length=loaders.pass_length,
        start=arguments.start,
        merge=settings.rounds.merge,
        alphas=settings.rounds.alphas,
        recalibration_batches=settings.evaluation.recalibration_batches,
        seed=arguments.seed,
        callbacks=arguments.callbacks,
        precision=precision_of(launch, settings.execution.mixed_precision),
        execution=settings.execution,
        output=settings.output,
    )


def with_epochs(options: Options, arguments: TrainerArguments, epochs: int) -> Options:
    """Options with as many epochs of every round as a budget of hours allows."""
    division = _of_epochs(arguments, options.rounds, epochs)
    return replace(
        options,
        epochs=division.epochs,
        finishing_epochs=division.finishing_epochs,
        rewind_epoch=division.rewind_epoch,
    )


def _division(arguments: TrainerArguments, plan: Plan, steps_per_epoch: int, resumed_epochs: int | None) -> Division:
    if arguments.total_hours is not None and resumed_epochs is None:
        return Division(epochs=1, finishing_epochs=0, rewind_epoch=0)
    if arguments.total_steps is None:
        return _of_epochs(arguments, len(plan), resumed_epochs or arguments.epochs or PAPER_EPOCHS)
    recipe, rounds = arguments.named_recipe, arguments.settings.rounds
    in_all = _rounds_in_all(arguments, len(plan))
    return divide_steps(
        arguments.total_steps,
        in_all,
        recipe.finishing,
        steps_per_epoch,
        rewind_epoch=rounds.rewind_epoch,
        start=arguments.start,
        rewound=rounds.rewind_schedule and recipe.rewind and in_all > len(plan),
    )


def _of_epochs(arguments: TrainerArguments, rounds: int, epochs: int) -> Division:
    finishing = finishing_epochs(epochs, _rounds_in_all(arguments, rounds), arguments.named_recipe.finishing)
    rewind_epoch = rewind_epoch_of(arguments.settings.rounds.rewind_epoch, arguments.start, epochs)
    return Division(epochs, finishing, rewind_epoch)


def _rounds_in_all(arguments: TrainerArguments, rounds: int) -> int:
    """Rounds, the dense one included where there is one."""
    return rounds + (arguments.start == "scratch" and arguments.named_recipe.rounds == "levels")
