"""What a run is asked to do, checked."""

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
from .step.distill import DistillFn
from .step.forward import ForwardFn, LossFn
from .step.precision import FULL, Precision

__all__ = ["OptimizerFactory", "Options", "default_optimizer"]

OptimizerFactory = Callable[[Iterable[Any]], Optimizer]
Start = Literal["scratch", "pretrained"]
OnNan = Literal["raise", "skip"]


@dataclass(frozen=True, kw_only=True)
class Options:
    """The arguments of :class:`~cocktailsdk.CoTrainer`, which documents them, and what follows from them.

    Attributes:
        epochs: Epochs of the longest round; the last may be a part of one, where there is a budget of steps.
        finishing_epochs: The same of finishing; 0 for none.
        steps_per_epoch: Optimizer steps of an epoch.
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
    total_hours: float | None
    rewind_epoch: int
    rewind_schedule: bool
    rounds: int
    steps_per_epoch: int
    start: Start
    merge: bool
    alphas: Sequence[float]
    recalibration_batches: int
    seed: int
    save_seconds: float
    save_minutes: float
    on_nan: OnNan
    event_seconds: float
    callbacks: Sequence[Callback]
    precision: Precision = FULL
    accumulate: int = 1
    budget: tuple[int, ...] = ()
    pass_length: int | None = None
    clip_norm: float | None = None
    ema: float | None = None
    sync_batch_norm: bool = False

    def __post_init__(self) -> None:
        checks = {
            "start": (self.start in ("scratch", "pretrained"), 'must be "scratch" or "pretrained"'),
            "metric_mode": (self.metric_mode in ("max", "min"), 'must be "max" or "min"'),
            "on_nan": (self.on_nan in ("raise", "skip"), 'must be "raise" or "skip"'),
            "save_seconds": (self.save_seconds >= 0, "must not be negative"),
            "save_minutes": (self.save_minutes >= 0, "must not be negative"),
            "epochs": (self.epochs >= 1, "must be at least 1"),
            "rounds": (self.rounds >= 1, "must be at least 1"),
            "rewind_epoch": (
                0 <= self.rewind_epoch <= self.epochs - self.rewind_schedule,
                f"must lie in 0 … {self.epochs - self.rewind_schedule} (epochs"
                f"{' - 1, with rewind_schedule' if self.rewind_schedule else ''})",
            ),
            "distill_weight": (0 <= self.distill_weight <= 1, "must lie in 0 … 1"),
            "recalibration_batches": (self.recalibration_batches >= 1, "must be at least 1"),
            "alphas": (
                len(self.alphas) > 0 and all(0 < a <= 1 for a in self.alphas),
                "must be shares in (0, 1], at least one",
            ),
            "accumulate": (self.accumulate >= 1, "must be at least 1"),
            "clip_norm": (self.clip_norm is None or self.clip_norm > 0, "must be above 0, or None"),
            "ema": (self.ema is None or 0 < self.ema < 1, "must lie between 0 and 1, or be None"),
            "callbacks": (all(map(callable, self.callbacks)), "must all be callable"),
        }
        for name, (holds, rule) in checks.items():
            if not holds:
                raise TrainingError(f"{name} {rule}, got {getattr(self, name)!r}")
        if self.ema is not None and self.recipe.weights == "own":
            raise TrainingError(
                f"recipe {self.recipe.name!r} keeps several sets of weights, and ema averages one: leave it out"
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
