"""What a run does: the trainer's arguments, and what follows from them for the net and the loaders."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch.optim import SGD, Optimizer

from ..errors import TrainingError
from .budget import epochs_in
from .events import Callback
from .metrics import MetricFn
from .recipes import Recipe
from .schedules import ScheduleFactory
from .settings import ExecutionSettings, OutputSettings
from .step.distill import DistillFn
from .step.execution import Precision
from .step.forward import ForwardFn, LossFn

__all__ = ["OptimizerFactory", "Options", "default_optimizer"]

OptimizerFactory = Callable[[Iterable[Any]], Optimizer]
Start = Literal["scratch", "pretrained"]


@dataclass(frozen=True, kw_only=True)
class Options:
    """The arguments of :class:`~cocktailsdk.CoTrainer`, which documents them, and what follows from them.

    Made by :func:`~.build_options.build_options`.

    Attributes:
        epochs: Epochs of the longest round; the last may be a part of one, where there is a budget of steps.
        finishing_epochs: The same of finishing; 0 for none.
        steps_per_epoch: Optimizer steps of an epoch.
        gradient_accumulation_steps: Batches of an optimizer step.
        budget: Optimizer steps of every round and of finishing; empty where all have whole epochs.
        pass_length: Batches of a pass over the training loader; ``None`` where it cannot say.
    """

    recipe: Recipe
    loss_fn: LossFn | None
    forward_fn: ForwardFn
    distill_fn: DistillFn | None
    distill_weight: float
    metric: MetricFn | None
    metric_mode: Literal["max", "min"]
    optimizer: OptimizerFactory
    schedule: ScheduleFactory
    epochs: int
    finishing_epochs: int
    budget: tuple[int, ...] = ()
    total_hours: float | None
    rewind_epoch: int
    rewind_schedule: bool
    rounds: int
    steps_per_epoch: int
    gradient_accumulation_steps: int
    pass_length: int | None
    start: Start
    merge: bool
    alphas: Sequence[float]
    recalibration_batches: int
    seed: int
    callbacks: Sequence[Callback]
    precision: Precision
    execution: ExecutionSettings
    output: OutputSettings

    def __post_init__(self) -> None:
        last = self.epochs - self.rewind_schedule
        if not 0 <= self.rewind_epoch <= last:
            rule = f"0 … {last} (epochs{' - 1, with rewind_schedule' if self.rewind_schedule else ''})"
            raise TrainingError(f"rewind_epoch must lie in {rule}, got {self.rewind_epoch!r}")
        if self.execution.ema_decay is not None and self.recipe.weights == "own":
            raise TrainingError(
                f"recipe {self.recipe.name!r} keeps several sets of weights, and ema_decay averages one: leave it out"
            )

    @property
    def first_round(self) -> int:
        """0, or 1 where the given weights are the rewind point."""
        return 0 if self.start == "scratch" and self.recipe.rounds == "levels" else 1

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
        return self.merge and self.recipe.merges

    @property
    def distillation(self) -> float:
        """Share of the distillation loss on sparse passes."""
        return self.recipe.distillation(self.distill_weight)

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
        rewound = self.rewind_schedule and self.rewinds and self.start == "scratch"
        return self.rewind_epoch if rewound and 0 < round_ <= self.rounds else 0

    def steps_before(self, round_: int) -> int:
        """Optimizer steps of all rounds before one."""
        return sum(self.steps_of(k) for k in range(self.first_round, round_))

    @property
    def total_steps(self) -> int:
        """Optimizer steps of all rounds, finishing included."""
        return self.steps_before(self.finishing_round + 1)


def default_optimizer(start: Start) -> OptimizerFactory:
    """The paper's SGD: rate 0.1 (0.01 from pretrained weights), momentum 0.9, weight decay 1e-4."""
    rate = 0.1 if start == "scratch" else 0.01
    return lambda parameters: SGD(parameters, lr=rate, momentum=0.9, weight_decay=1e-4)
