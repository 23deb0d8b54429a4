"""The arguments of :class:`~cocktailsdk.CoTrainer`, checked, as one record."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ..errors import TrainingError
from .arguments import check_numbers, one_budget, shortened
from .data.loader_state import refuse_spent
from .events import Callback
from .metrics import MetricFn
from .options import OptimizerFactory, Start
from .recipes import Recipe, recipe_named
from .schedules import ScheduleFactory
from .settings import Settings
from .step.forward import LossFn

__all__ = ["TrainerArguments"]


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
    epochs: int | None
    total_steps: int | None
    total_hours: float | None
    start: Start
    recipe: str | Recipe
    optimizer: OptimizerFactory | None
    schedule: ScheduleFactory | None
    out_dir: str | PathLike[str] | None
    device: str | torch.device | None
    seed: int
    callbacks: Sequence[Callback]
    settings: Settings

    def __post_init__(self) -> None:
        for name in ("loss_fn", "metric", "optimizer", "schedule"):
            value = getattr(self, name)
            if value is not None and not callable(value):
                built = isinstance(value, Optimizer | LRScheduler)
                hint = ": give a function that makes one, since each round needs its own" if built else ""
                raise TrainingError(f"{name} must be callable, got {type(value).__name__}{hint}")
        budgets = {"epochs": self.epochs, "total_steps": self.total_steps, "total_hours": self.total_hours}
        check_numbers(**budgets, seed=self.seed)
        one_budget(**budgets)
        self._check_kinds()
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
        """The recipe, looked up where only its name was given."""
        return self.recipe if isinstance(self.recipe, Recipe) else recipe_named(self.recipe)
