"""Settings of :class:`~cocktailsdk.CoTrainer`, in six groups by subject.

The arguments that most runs need are keywords of the trainer. All other settings are in groups, each with a keyword of
its own:

================== ====================================
keyword            settings of
================== ====================================
``distillation=``  how the dense network teaches
``rounds=``        how rounds are made and merged
``evaluation=``    how networks are measured
``batches=``       how batches are used
``execution=``     how an optimizer step is computed
``output=``        what the run writes and reports
================== ====================================

Settings have the names that transformers, accelerate and timm use (``max_grad_norm``,
``gradient_accumulation_steps``, ``ema_decay``).

All groups are frozen. ``dataclasses.replace(settings, ...)`` makes a variant.

Example:
    ```python
    trainer = cocktail.CoTrainer(
        net,
        train_loader,
        loss_fn,
        val_loader=val_loader,
        rounds=cocktail.RoundSettings(count=3),
        execution=cocktail.ExecutionSettings(mixed_precision="bf16", max_grad_norm=1.0),
    )
    ```
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, Literal

from ..errors import TrainingError
from ..utils.losses import ForwardFn
from .step.distill import DistillFn
from .step.execution import MixedPrecision

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = [
    "ALPHAS",
    "BatchSettings",
    "DistillationSettings",
    "EvaluationSettings",
    "ExecutionSettings",
    "OutputSettings",
    "RoundSettings",
    "Settings",
    "check_numbers",
    "shortened",
]

ALPHAS = (1.0, 0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.05)
"""Interpolation coefficients that merging tries, from the largest down; 1 rejects a round's weights."""


INTEGERS: Mapping[str, float] = {
    **dict.fromkeys(("total_steps", "steps", "steps_per_epoch", "count", "rounds"), 1),
    **dict.fromkeys(("recalibration_batches", "gradient_accumulation_steps"), 1),
    "rewind_epoch": 0,
    "seed": -math.inf,
}
"""Whole numbers, and the least that each may be."""
RANGES: Mapping[str, tuple[str, Callable[[float], bool]]] = {
    **dict.fromkeys(("save_seconds", "save_minutes", "event_seconds"), ("at least 0", lambda x: x >= 0)),
    **dict.fromkeys(
        ("epochs", "total_hours", "learning_rate", "lowest", "highest", "max_grad_norm", "temperature"),
        ("above 0, and finite", lambda x: 0 < x < math.inf),
    ),
    "weight": ("in 0 … 1", lambda x: 0 <= x <= 1),
    "ema_decay": ("between 0 and 1", lambda x: 0 < x < 1),
}
"""What other numbers must be, and whether they are."""
EXAMPLES: Mapping[str, str] = {
    "epochs": "epochs=20, or a fraction such as epochs=0.5",
    "total_steps": "total_steps=400",
    "total_hours": "total_hours=1.5",
    "learning_rate": "learning_rate=0.01",
}
"""What may be typed instead of a number that is refused."""


@dataclass(frozen=True, kw_only=True)
class DistillationSettings:
    """How the dense network teaches the subnetworks.

    Attributes:
        weight: Weight of the distillation loss on sparse steps, in [0, 1]. The loss from the labels has the weight
            ``1 - weight``. A recipe may set its own weight instead, but 0 turns distillation off in every recipe.
        loss_fn: ``loss_fn(student_output, teacher_output) -> scalar``. Default: soft cross-entropy, for classification
            and language models with integer labels. Other tasks need their own function, or ``weight=0``.
        temperature: Temperature T of the default loss, above 0: both outputs are divided by T, and the loss is
            multiplied by T². Default: the recipe's. The size of gradients grows with T, and so does the effective
            learning rate.
    """

    weight: float = 0.5
    loss_fn: DistillFn | None = None
    temperature: float | None = None

    def __post_init__(self) -> None:
        _check_numbers(self, "weight", "temperature")
        _check_callable(self, "loss_fn")
        if self.loss_fn is not None and self.temperature is not None:
            raise TrainingError(
                "DistillationSettings.temperature is for the default loss, and loss_fn replaces that: leave out one"
            )


@dataclass(frozen=True, kw_only=True)
class RoundSettings:
    """How many rounds a run has, where they begin, and how their weights are merged.

    Attributes:
        count: Number of rounds after round 0. Default: the largest number of levels of a pattern.
        rewind_epoch: If the recipe rewinds, every round begins with the weights that round 0 had after this many
            epochs. Default: 7 of 150 epochs, in proportion.
        rewind_schedule: Whether the optimizer and its schedule are rewound too. A round then has
            ``epochs - rewind_epoch`` epochs. By default both start anew in every round.
        merge: Whether a recipe that merges rounds does so. If false, the last round's weights are the result.
        alphas: Interpolation coefficients α that merging tries, each in (0, 1].
    """

    count: int | None = None
    rewind_epoch: int | None = None
    rewind_schedule: bool = False
    merge: bool = True
    alphas: Sequence[float] = ALPHAS

    def __post_init__(self) -> None:
        _check_numbers(self, "count", "rewind_epoch")
        alphas = tuple(self.alphas) if isinstance(self.alphas, Iterable) else ()
        if not alphas or not all(isinstance(a, Real) and not isinstance(a, bool) and 0 < a <= 1 for a in alphas):
            rule = "numbers in (0, 1], at least one, like (1.0, 0.5)"
            raise TrainingError(f"RoundSettings.alphas must be {rule}, got {shortened(self.alphas)}")
        object.__setattr__(self, "alphas", alphas)  # any iterable is taken, and the class is frozen


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """How networks are measured.

    Attributes:
        metric_mode: ``"max"`` if a larger metric is better, ``"min"`` if a smaller one is.
        recalibration_batches: Number of training batches from which a network's batch-norm statistics are computed
            before it is measured. A recipe that refits the classifier head fits it to the features of these batches.
            Default: 96 for such recipes, otherwise 8.
    """

    metric_mode: Literal["max", "min"] = "max"
    recalibration_batches: int | None = None

    def __post_init__(self) -> None:
        _check_choice(self, "metric_mode", ("max", "min"))
        _check_numbers(self, "recalibration_batches")


@dataclass(frozen=True, kw_only=True)
class BatchSettings:
    """How the batches of the loaders are used.

    Attributes:
        forward_fn: ``forward_fn(model, batch) -> (output, target)``. Default: handles tensors, ``(inputs, target)`` and
            mappings.
        steps_per_epoch: Number of batches in an epoch. Default: the loader's length. Each epoch continues in the loader
            where the last one stopped, so no batch is left out.
        shard_loader: Whether each batch of ``train_loader`` is divided among processes. Set ``False`` if the loader
            gives each process its own part. Default: divided, unless the loader has a ``DistributedSampler`` or was
            prepared by Accelerate.
    """

    forward_fn: ForwardFn | None = None
    steps_per_epoch: int | None = None
    shard_loader: bool | None = None

    def __post_init__(self) -> None:
        _check_numbers(self, "steps_per_epoch")
        _check_callable(self, "forward_fn")


@dataclass(frozen=True, kw_only=True)
class ExecutionSettings:
    """How an optimizer step is computed, on one process or several.

    Attributes:
        accelerator: Your own ``accelerate.Accelerator``. Default: one is made under ``torchrun`` and
            ``accelerate launch``; see the page on several processes.
        mixed_precision: ``"bf16"`` or ``"fp16"`` computes training passes in 16 bits. Weights, masks, statistics,
            metrics and merging keep the weights' own precision. Default: the accelerator's.
        gradient_accumulation_steps: Number of batches in an optimizer step. Gradients are those of the mean over all
            their examples. Default: the accelerator's ``gradient_accumulation_steps``, or 1.
        max_grad_norm: Largest norm of all gradients of a step together; larger gradients are scaled down to this norm.
            Default: no limit.
        ema_decay: Decay of an exponential moving average of the weights, in (0, 1), for example 0.999. Each round ends
            with the average, which is then measured, pruned, merged and trained further. The average takes one more
            copy of the trained weights. Default: no average.
        sync_batch_norm: Whether batch norms on several GPUs normalize by the examples of all processes.
        on_nan: What happens if a loss is NaN or infinite. ``"raise"`` stops the run and names the step, without
            waiting for the device in every step. ``"skip"`` leaves out the step, also if only gradients are not finite:
            weights, momentum and statistics stay as they were. ``"skip"`` waits for the device in every step, and stops
            the run after 25 skipped steps in a row.
    """

    accelerator: Accelerator | None = None
    mixed_precision: MixedPrecision | None = None
    gradient_accumulation_steps: int | None = None
    max_grad_norm: float | None = None
    ema_decay: float | None = None
    sync_batch_norm: bool = False
    on_nan: Literal["raise", "skip"] = "raise"

    def __post_init__(self) -> None:
        _check_numbers(self, "gradient_accumulation_steps", "max_grad_norm", "ema_decay")
        _check_choice(self, "mixed_precision", (None, "bf16", "fp16"))
        _check_choice(self, "on_nan", ("raise", "skip"))


@dataclass(frozen=True, kw_only=True)
class OutputSettings:
    """How often a run saves to ``out_dir`` and reports to ``callbacks``.

    Attributes:
        save_seconds: At the end of an epoch, the run saves if this many seconds have passed since the last save. It
            always saves at the end of a round.
        save_minutes: After this many minutes without a save, the run saves within an epoch, while merging, and while it
            measures networks.
        event_seconds: Smallest number of seconds between two events that report progress within an epoch or a merge.
        config: JSON values that describe what the trainer cannot see, for example the data. A run with another
            ``config`` does not resume.
    """

    save_seconds: float = 10.0
    save_minutes: float = 5.0
    event_seconds: float = 0.1
    config: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        _check_numbers(self, "save_seconds", "save_minutes", "event_seconds")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All groups, each under the keyword that :class:`~cocktailsdk.CoTrainer` takes it by."""

    distillation: DistillationSettings = field(default_factory=DistillationSettings)
    rounds: RoundSettings = field(default_factory=RoundSettings)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    batches: BatchSettings = field(default_factory=BatchSettings)
    execution: ExecutionSettings = field(default_factory=ExecutionSettings)
    output: OutputSettings = field(default_factory=OutputSettings)

    def __post_init__(self) -> None:
        for name, group in GROUPS.items():
            if not isinstance(value := getattr(self, name), group):
                raise TrainingError(
                    f"{name} must be {group.__name__}, got {shortened(value)}: write {name}={group.__name__}(...)"
                )


GROUPS: Mapping[str, Any] = {f.name: f.default_factory for f in fields(Settings)}
"""The class of every group by its keyword."""


def _check_numbers(settings: Any, *names: str) -> None:
    check_numbers(f"{type(settings).__name__}.", **{name: getattr(settings, name) for name in names})


def _check_callable(settings: Any, name: str) -> None:
    value = getattr(settings, name)
    if value is not None and not callable(value):
        raise TrainingError(f"{type(settings).__name__}.{name} must be callable, got {type(value).__name__}")


def _check_choice(settings: Any, name: str, choices: Sequence[str | None]) -> None:
    value = getattr(settings, name)
    if value not in choices:
        *others, last = ("None" if choice is None else f'"{choice}"' for choice in choices)
        rule = f"{', '.join(others)} or {last}"
        raise TrainingError(f"{type(settings).__name__}.{name} must be {rule}, got {shortened(value)}")


def check_numbers(owner: str = "", /, **values: Any) -> None:
    """Check that arguments are numbers in their range; ``None`` stands for a default.

    Args:
        owner: What the names are of, for errors; a class of settings, say.
        **values: By name.

    Raises:
        TrainingError: One is not; names it, and what it must be.
    """
    for name, value in values.items():
        if value is not None and (rule := _broken_rule(name, value)) is not None:
            hint = f": write {EXAMPLES[name]}" if name in EXAMPLES else ""
            raise TrainingError(f"{owner}{name} must be {rule}, got {shortened(value)}{hint}")


def _broken_rule(name: str, value: Any) -> str | None:
    """What a number must be and is not; ``None`` if it is."""
    if name in INTEGERS:
        if not isinstance(value, Integral) or isinstance(value, bool):
            return "a whole number"
        return None if int(value) >= INTEGERS[name] else f"at least {INTEGERS[name]}"
    if not isinstance(value, Real) or isinstance(value, bool) or math.isnan(value):
        return "a number"
    rule, holds = RANGES.get(name, ("", lambda x: True))
    return None if holds(float(value)) else rule


def shortened(value: Any) -> str:
    """A value as text for an error, with its type unless it is a number."""
    text = repr(value).replace("\n", " ")
    kind = "" if isinstance(value, int | float) and not isinstance(value, bool) else f" ({type(value).__name__})"
    return f"{text[:60]}{'…' if len(text) > 60 else ''}{kind}"
