"""The trainer's arguments, checked, and what follows from them: what a run does."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from numbers import Integral
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ..errors import TrainingError
from ..utils.losses import ForwardFn, LossFn
from ..utils.nested import default_forward
from .budget import Division, RunLength, divide_epochs, divide_steps, epochs_in
from .data.loader_state import epoch_length, loader_length, refuse_spent
from .distributed.launch import Launch, accumulated, precision_of
from .distributed.ranks import Ranks
from .distributed.sharing import held_out_loader, shared_loader
from .events import Callback
from .metrics import MetricFn
from .optimizers import OptimizerFactory, OptimizerName, Start, choose_optimizer
from .recipes import Recipe, default_recipe, recipe_named
from .recipes.recipe import check_start
from .round_plan import Plan
from .schedules import ScheduleFactory, cosine, cosine_restarts
from .settings import Settings, check_numbers, shortened
from .step.execution import Precision

__all__ = ["Loaders", "Options", "TrainerArguments", "build_options"]

PAPER_EPOCHS = 150
"""Epochs of a round in the paper (CIFAR-10), where neither epochs nor a budget are given."""
TRAINED_EPOCHS = 10
"""The same of a run from trained weights whose networks all train in one round."""
RECALIBRATION, REFIT = 8, 96
"""Training batches for statistics; and for these and a classifier head. Heads fitted on ResNet-20 to 96 batches of 64
images instead of 48 gave channel@0.469 0.8 points and unstructured@0.893 0.6; 160 gave no more."""


@dataclass(frozen=True, kw_only=True)
class TrainerArguments:
    """What :class:`~cocktailsdk.CoTrainer`, which documents it, was called with.

    Raises:
        TrainingError: An argument makes no sense; names it.
    """

    train_loader: Iterable[Any]
    loss_fn: LossFn | None
    val_loader: Iterable[Any] | None
    metric: MetricFn | None
    epochs: float | None
    total_steps: int | None
    total_hours: float | None
    start: Start
    recipe: str | Recipe | None
    optimizer: OptimizerFactory | OptimizerName | None
    learning_rate: float | None
    schedule: ScheduleFactory | None
    out_dir: str | PathLike[str] | None
    device: str | torch.device | None
    seed: int
    callbacks: Sequence[Callback]
    settings: Settings

    def __post_init__(self) -> None:
        for name in ("loss_fn", "metric", "optimizer", "schedule"):
            value = getattr(self, name)
            named = name == "optimizer" and isinstance(value, str)
            if value is not None and not callable(value) and not named:
                built = isinstance(value, Optimizer | LRScheduler)
                hint = ": give a function that makes one, since each round needs its own" if built else ""
                raise TrainingError(f"{name} must be callable, got {type(value).__name__}{hint}")
        budgets = {"epochs": self.epochs, "total_steps": self.total_steps, "total_hours": self.total_hours}
        check_numbers(**budgets, learning_rate=self.learning_rate, seed=self.seed)
        for name in (*budgets, "learning_rate", "seed"):  # NumPy's numbers as Python's: a configuration is JSON
            value = getattr(self, name)
            if value is not None and not isinstance(value, int | float):
                object.__setattr__(self, name, int(value) if isinstance(value, Integral) else float(value))
        given = [f"{name}={value}" for name, value in budgets.items() if value is not None]
        if len(given) > 1:
            raise TrainingError(f"give one of epochs, total_steps and total_hours; got {', '.join(given)}")
        self._check_kinds()
        check_start(self.named_recipe, self.start)
        refuse_spent(self.val_loader, "val_loader")
        if self.settings.rounds.merge and self.named_recipe.merges and self.val_loader is None:
            raise TrainingError("merging needs held-out data: give val_loader, or rounds=RoundSettings(merge=False)")

    def _check_kinds(self) -> None:
        if self.start not in ("scratch", "pretrained"):
            raise TrainingError(f'start must be "scratch" or "pretrained", got {self.start!r}')
        if not isinstance(self.callbacks, Iterable):
            raise TrainingError(f"callbacks must be a list of functions, got {shortened(self.callbacks)}")
        object.__setattr__(self, "callbacks", tuple(self.callbacks))
        if not all(map(callable, self.callbacks)):
            raise TrainingError(f"callbacks must all be callable, got {self.callbacks!r}")
        if self.out_dir is not None and (not isinstance(self.out_dir, str | PathLike) or not str(self.out_dir)):
            raise TrainingError(f"out_dir must be a folder's path, got {shortened(self.out_dir)}")

    @property
    def out_folder(self) -> Path | None:
        """``out_dir`` as a path."""
        return None if self.out_dir is None else Path(self.out_dir)

    @property
    def named_recipe(self) -> Recipe:
        """The recipe, looked up where only its name was given, or nothing."""
        if self.recipe is None:
            return default_recipe(self.start)
        return self.recipe if isinstance(self.recipe, Recipe) else recipe_named(self.recipe)

    @property
    def first_round(self) -> int:
        """0, or 1 where the given weights are the rewind point."""
        return 0 if self.start == "scratch" and self.named_recipe.rounds == "levels" else 1


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


@dataclass(frozen=True, kw_only=True)
class Options(TrainerArguments):
    """The arguments with their defaults filled in, and what follows from them for the net and the loaders.

    Made by :func:`build_options`.

    Attributes:
        optimizer: Makes the optimizer of a round.
        optimizer_reason: Why it is this one, for logs.
        epochs: Epochs of the longest round; the last may be a part of one.
        finishing_epochs: The same of finishing; 0 for none.
        steps_per_epoch: Optimizer steps of an epoch.
        gradient_accumulation_steps: Batches of an optimizer step.
        budget: Optimizer steps of every round and of finishing; empty where all have whole epochs.
        pass_length: Batches of a pass over the training loader; ``None`` where it cannot say.
    """

    recipe: Recipe
    optimizer: OptimizerFactory
    optimizer_reason: str
    schedule: ScheduleFactory
    forward_fn: ForwardFn
    epochs: int
    finishing_epochs: int
    budget: tuple[int, ...]
    rewind_epoch: int
    rounds: int
    steps_per_epoch: int
    gradient_accumulation_steps: int
    pass_length: int | None
    precision: Precision

    def __post_init__(self) -> None:
        rewound = self.settings.rounds.rewind_schedule
        last = self.epochs - rewound
        if not 0 <= self.rewind_epoch <= last:
            rule = f"0 … {last} (epochs{' - 1, with rewind_schedule' if rewound else ''})"
            raise TrainingError(f"rewind_epoch must lie in {rule}, got {self.rewind_epoch!r}")
        if self.settings.execution.ema_decay is not None and self.recipe.weights == "own":
            raise TrainingError(
                f"recipe {self.recipe.name!r} keeps several sets of weights, and ema_decay averages one: leave it out"
            )

    @property
    def finishing_round(self) -> int:
        """The number of the round after merging, whether there is one or not."""
        return self.rounds + 1

    @property
    def rewinds(self) -> bool:
        """Whether rounds begin from the rewind point."""
        return self.recipe.rewind and self.recipe.rounds == "levels"

    @property
    def merges(self) -> bool:
        """Whether rounds are merged."""
        return self.settings.rounds.merge and self.recipe.merges

    @property
    def distillation(self) -> float:
        """Share of the distillation loss on sparse passes."""
        return self.recipe.distillation(self.settings.distillation.weight)

    @property
    def temperature(self) -> float | None:
        """Of the distillation loss; ``None`` chooses by the logits' shape."""
        given = self.settings.distillation.temperature
        return self.recipe.temperature if given is None else given

    @property
    def frozen_teacher(self) -> bool:
        """Whether the weights that the run starts from teach."""
        return self.recipe.teacher == "frozen" and bool(self.distillation)

    @property
    def recalibration_batches(self) -> int:
        """Training batches for a network's statistics, and for its classifier head where one is refitted."""
        given = self.settings.evaluation.recalibration_batches
        return given or (RECALIBRATION if self.recipe.refit_head == "none" else REFIT)

    def epochs_of(self, round_: int) -> range:
        """The epochs that a round trains; the last may be a part of one."""
        begin = self._begin(round_)
        if self.budget:
            return range(begin, begin + epochs_in(self.steps_of(round_), self.steps_per_epoch))
        return range(begin, self.finishing_epochs if round_ > self.rounds else self.epochs)

    def steps_of(self, round_: int) -> int:
        """Optimizer steps of a round."""
        if self.budget:
            at = round_ - self.first_round
            return self.budget[at] if at < len(self.budget) else 0
        return len(self.epochs_of(round_)) * self.steps_per_epoch

    def steps_in(self, round_: int, epoch: int) -> int:
        """Optimizer steps of an epoch of a round: fewer where the round's budget ends in it."""
        before = (epoch - self._begin(round_)) * self.steps_per_epoch
        return min(self.steps_per_epoch, self.steps_of(round_) - before)

    def schedule_steps(self, round_: int) -> int:
        """Optimizer steps that a round's learning-rate schedule is made for; a rewound one began before the round."""
        return self._begin(round_) * self.steps_per_epoch + self.steps_of(round_)

    def _begin(self, round_: int) -> int:
        """The epoch with which a round begins."""
        rewound = self.settings.rounds.rewind_schedule and self.rewinds and self.start == "scratch"
        return self.rewind_epoch if rewound and 0 < round_ <= self.rounds else 0

    def steps_before(self, round_: int) -> int:
        """Optimizer steps of all rounds before one."""
        return sum(self.steps_of(k) for k in range(self.first_round, round_))

    @property
    def all_steps(self) -> int:
        """Optimizer steps of all rounds, finishing included."""
        return self.steps_before(self.finishing_round + 1)


def build_options(
    arguments: TrainerArguments,
    model: nn.Module,
    plan: Plan,
    loaders: Loaders,
    launch: Launch,
    length: RunLength | None = None,
) -> Options:
    """What a run does.

    Args:
        arguments: The trainer's.
        model: The user's.
        plan: The subnets of every round.
        loaders: The run's.
        launch: The processes and their devices.
        length: What fits into a budget of hours, once it is known. Until then a round has one epoch, so that a step
            can be measured.

    Raises:
        TrainingError: Arguments do not fit each other, the loaders or the recipe.
    """
    settings = arguments.settings
    size = accumulated(launch, settings.execution.gradient_accumulation_steps)
    steps_per_epoch = -(-loaders.epoch_batches // size)
    optimizer = choose_optimizer(
        arguments.optimizer,
        arguments.learning_rate,
        model,
        start=arguments.start,
        by_model=arguments.named_recipe.optimizer_defaults == "by model",
    )
    filled_in = {
        "recipe": arguments.named_recipe,
        "optimizer": optimizer.factory,
        "optimizer_reason": optimizer.reason,
        "schedule": arguments.schedule or _default_schedule(arguments.named_recipe),
        **asdict(_division(arguments, len(plan), steps_per_epoch, length)),
    }
    return Options(
        **{**vars(arguments), **filled_in},
        forward_fn=settings.batches.forward_fn or default_forward,
        rounds=len(plan),
        steps_per_epoch=steps_per_epoch,
        gradient_accumulation_steps=size,
        pass_length=loaders.pass_length,
        precision=precision_of(launch, settings.execution.mixed_precision),
    )


def _division(arguments: TrainerArguments, rounds: int, steps_per_epoch: int, length: RunLength | None) -> Division:
    if length is None:
        if arguments.total_hours is not None:
            return Division(epochs=1, finishing_epochs=0, rewind_epoch=0)
        default = TRAINED_EPOCHS if arguments.named_recipe.teacher == "frozen" else PAPER_EPOCHS
        length = RunLength(arguments.epochs or default, arguments.total_steps)
    recipe, settings = arguments.named_recipe, arguments.settings.rounds
    in_all = rounds + 1 - arguments.first_round
    kept: dict[str, Any] = {
        "rewind_epoch": settings.rewind_epoch,
        "start": arguments.start,
        "rewound": settings.rewind_schedule and recipe.rewind and in_all > rounds,
    }
    if length.total_steps is not None:
        return divide_steps(length.total_steps, in_all, recipe.finishing, steps_per_epoch, **kept)
    return divide_epochs(length.epochs, in_all, recipe.finishing, steps_per_epoch, **kept)


def _default_schedule(recipe: Recipe) -> ScheduleFactory:
    return cosine() if recipe.decay == "cosine" else cosine_restarts()
