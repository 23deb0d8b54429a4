"""A learning-rate range test (Smith, 2017, arXiv:1506.01186) over the subnetworks of a run, and what it suggests.

A few dozen steps are trained while the rate rises geometrically. Training losses of such steps cannot be compared: each
step has another batch, and mostly another subnetwork. Instead, the same few networks are measured on the same batches
after every other step, with the loss of training.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..errors import TrainingError
from ..patterns.base import DENSE
from .distributed.sharing import examples
from .dry_run import dry_run
from .optimization import Optimization
from .session import Session
from .settings import check_numbers, shortened
from .step.engine import Stepper
from .user_code import next_batches

__all__ = ["LearningRateSuggestion", "best_rate", "suggest_rate"]

POINTS = 30
"""How often the networks are measured at most."""
EXAMPLES, BATCHES = 128, 4
"""They are measured on batches with so many examples together, or on so many batches."""
FACTOR = 30.0
"""The test begins at the optimizer's rate divided by this, and ends at the rate times this."""
VALLEY = 0.2
"""Share of the whole decrease that the loss may be above its minimum within the valley."""
DIVERGED = 4.0
"""The test ends when the loss is so many times that of the beginning."""


@dataclass(frozen=True)
class LearningRateSuggestion:
    """A learning rate, and the measurements that it was read from.

    Attributes:
        rate: The suggestion.
        rates: Rates at which the loss was measured, rising. The test ends early where the loss diverges.
        losses: The training loss after the step at each rate: a mean over networks, on the same batches.
        optimizer: The optimizer's class.
    """

    rate: float
    rates: tuple[float, ...]
    losses: tuple[float, ...]
    optimizer: str

    def __str__(self) -> str:
        smoothed = _smoothed(self.losses)
        lowest = min(smoothed)
        more = ""
        if smoothed[-1] == lowest:
            more = f"; it was still falling there: try suggest_lr(highest={self.rates[-1] * FACTOR:.2g})"
        return (
            f"learning_rate={self.rate:.2g} for {self.optimizer}: between rates of {self.rates[0]:.2g} and "
            f"{self.rates[-1]:.2g} the loss fell from {self.losses[0]:.3g} to {lowest:.3g}{more}"
        )


def suggest_rate(
    session: Session, *, steps: int, lowest: float | None = None, highest: float | None = None
) -> LearningRateSuggestion:
    """Measure the loss while the rate rises, and put everything back.

    Args:
        session: Of a run, at its beginning.
        steps: Optimizer steps of the test.
        lowest: The first rate; by default the optimizer's divided by 30.
        highest: The last rate; by default 30 times the optimizer's.

    Raises:
        TrainingError: There is nothing to suggest: too few steps, no range, a loss that is not finite from the
            beginning or does not fall at any rate; says what to type.
    """
    check_numbers("suggest_lr: ", steps=steps, lowest=lowest, highest=highest)
    if steps < 10:
        raise TrainingError(f"suggest_lr(steps={steps}) is too short for a curve: write suggest_lr(steps=60)")
    if session.ranks.world > 1:
        raise TrainingError(
            "suggest_lr() runs in one process, and there are "
            f"{session.ranks.world}: call it in a program of its own, and write learning_rate=... with its result"
        )
    options = session.options
    optimization = Optimization.begin(session.net.model, options, options.first_round, session.device)
    start = _rate_of(optimization.optimizer)
    lowest, highest = lowest or start / FACTOR, highest or start * FACTOR
    if not lowest < highest:
        raise TrainingError(
            f"suggest_lr(lowest={lowest:g}, highest={highest:g}) is no range: write highest={lowest * FACTOR**2:g}"
        )
    rates = [lowest * (highest / lowest) ** (i / (steps - 1)) for i in range(steps)]
    foreign = [(p, p.detach().clone(), p.grad) for p in optimization.foreign]
    try:
        with dry_run(session):
            before, measured, losses = _measure(session, optimization, rates)
    finally:
        with torch.no_grad():
            for parameter, value, gradient in foreign:
                parameter.copy_(value)
                parameter.grad = gradient
    if not math.isfinite(before):
        raise TrainingError(
            f"the training loss is {before} before the first step, so there is no rate to suggest: check the model's "
            "output and the loss function on the first batch of train_loader"
        )
    rate = best_rate(measured, losses, before)
    if rate is None:
        raise TrainingError(
            f"the loss ({before:.4g}) did not fall at any rate between {lowest:.2g} and {highest:.2g}: write "
            f"suggest_lr(lowest={lowest / FACTOR:.2g}), or suggest_lr(steps={4 * steps})"
        )
    return LearningRateSuggestion(rate, tuple(measured), tuple(losses), type(optimization.optimizer).__name__)


def best_rate(rates: Sequence[float], losses: Sequence[float], before: float) -> float | None:
    """The middle of the valley of the smoothed curve: the geometric mean of its two edges.

    The edges are where the loss has fallen by 80 % of all that it falls. Measured on six pairs of model and optimizer,
    26 curves of 24 to 120 steps, against the best rate of a grid of runs of 120 steps. On average the suggestion was
    off by a factor of 1.5, at worst by 3.1. The minimum of the smoothed curve was as good, but depends on one point.
    A quarter of it was off by 5, a tenth by 13, the steepest slope by 8, and "valley" (fastai, Lightning) by 6, always
    downwards but for the slope. Those rules are for training losses, whose minimum lags behind the rate.

    Args:
        rates: Rising.
        losses: After the step at each rate.
        before: The loss before the first step.

    Returns:
        ``None`` if the loss does not fall.
    """
    smoothed = _smoothed(losses)
    lowest = min(smoothed, default=math.inf)
    if not lowest < before:
        return None
    bottom = smoothed.index(lowest)
    inside = [loss <= lowest + VALLEY * (before - lowest) for loss in smoothed]
    left = right = bottom
    while left > 0 and inside[left - 1]:
        left -= 1
    while right + 1 < len(inside) and inside[right + 1]:
        right += 1
    return math.sqrt(rates[left] * rates[right])


def _smoothed(losses: Sequence[float]) -> list[float]:
    """Means of five medians of three: single outliers count for nothing, and the ends are means of fewer."""
    medians = [statistics.median(losses[max(0, i - 1) : i + 2]) for i in range(len(losses))]
    return [statistics.fmean(medians[max(0, i - 2) : i + 3]) for i in range(len(medians))]


def _rate_of(optimizer: Optimizer) -> float:
    rate = optimizer.param_groups[0].get("lr")
    if rate is None or not 0 < float(rate) < math.inf:
        name = type(optimizer).__name__
        raise TrainingError(
            f"suggest_lr() changes the rate of an optimizer, and {name} has lr={shortened(rate)}: give {name} a "
            'learning rate above 0, or write optimizer="sgd" or optimizer="adamw"'
        )
    return float(rate)


def _measure(
    session: Session, optimization: Optimization, rates: Sequence[float]
) -> tuple[float, list[float], list[float]]:
    """The loss before the first step, then rates and the losses at them, until one is not finite or has diverged."""
    assert session.execution is not None
    stepper = Stepper.of(session.net, session.execution, session.options, session.classes)
    optimizer, round_ = optimization.optimizer, session.options.first_round
    first = [group["lr"] for group in optimizer.param_groups]
    batches = _batches(session)
    names = _networks(session, round_)

    def loss() -> float:
        return _mean_loss(session, stepper, names, batches)

    before, every = loss(), max(1, round(len(rates) / POINTS))
    measured: list[float] = []
    losses: list[float] = []
    session.modes.apply()
    try:
        for i, rate in enumerate(rates):
            for group, own in zip(optimizer.param_groups, first, strict=True):
                group["lr"] = own * (rate / float(first[0]))
            session.position.step = i
            drawn, _ = next_batches(session)
            step = session.step_at(round_, i % max(1, session.options.steps_of(round_)))
            session.seed("range test", i)
            result = stepper.step(step, drawn, optimizer, None, optimization.scaler)
            if not all(bool(value.isfinite()) for value in result.losses.values()):
                break
            if (i + 1) % every:
                continue
            now = loss()
            if not math.isfinite(now):
                break
            measured.append(rate)
            losses.append(now)
            if now > DIVERGED * before:
                break
    finally:
        session.data.stream.close()
    return before, measured, losses


def _networks(session: Session, round_: int) -> list[str]:
    """The dense network, and of every pattern the subnetwork of the middle level: about the mean of all of them."""
    return [DENSE, *(names[len(names) // 2] for names in session.networks(round_).values() if names)]


def _batches(session: Session) -> list[object]:
    batches = list(session.data.recalibration)  # on the device
    counts = itertools.accumulate(map(examples, batches))
    enough = next((i + 1 for i, count in enumerate(counts) if count >= EXAMPLES), BATCHES)
    return batches[: min(enough, BATCHES)]


def _mean_loss(session: Session, stepper: Stepper, names: Sequence[str], batches: Sequence[object]) -> float:
    losses: list[Tensor] = []
    for name in names:
        for i, batch in enumerate(batches):
            session.seed("range test", "loss", i)  # the same dropout every time
            losses.append(stepper.loss(name, batch))
    return float(torch.stack([loss.double() for loss in losses]).mean())
