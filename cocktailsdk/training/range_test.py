"""A learning-rate range test (Smith, 2017, arXiv:1506.01186) over the subnetworks of a run, and what it suggests.

A few dozen steps are trained while the rate rises geometrically. Training losses of such steps cannot be compared: each
step has another batch, and mostly another subnetwork. Instead, the same few networks are measured on the same batches
after every other step, with the loss of training.
"""

from __future__ import annotations

import copy
import itertools
import math
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
from .rate_curve import RateCurve, smoothed
from .session import Session
from .settings import check_numbers, shortened
from .step.engine import Stepper
from .user_code import next_batches

__all__ = ["LearningRateSuggestion", "suggest_rate"]

POINTS = 30
"""How often the networks are measured at most."""
EXAMPLES, BATCHES = 128, 4
"""They are measured on batches with so many examples together, or on so many batches."""
FACTOR = 30.0
"""The test begins at the optimizer's rate divided by this, and ends at the rate times this."""
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
        fell: Whether the loss fell clearly. If not, the test showed nothing, and the rate is the optimizer's own.
        capped: Whether the rate is lower than it would be, since the loss rises clearly above it: that of the dense
            network, or the mean.
    """

    rate: float
    rates: tuple[float, ...]
    losses: tuple[float, ...]
    optimizer: str
    fell: bool = True
    capped: bool = False

    def __str__(self) -> str:
        smooth = smoothed(self.losses)
        within = f"between rates of {self.rates[0]:.2g} and {self.rates[-1]:.2g} the loss"
        if self.fell:
            said = f"{within} fell from {self.losses[0]:.3g} to {min(smooth):.3g}"
        else:
            said = (
                f"{within} did not fall clearly, so the test showed nothing, and "
                f"{'this is no higher than' if self.capped else 'this is'} the optimizer's own rate; that is likely "
                "where the subnetworks are already close to the teacher"
            )
        return f"learning_rate={self.rate:.2g} for {self.optimizer}: {said}{self._limits(smooth)}"

    def _limits(self, smooth: Sequence[float]) -> str:
        """What the range, or the protection of the dense network, had to do with the rate."""
        said = ""
        if self.capped:
            said += f"; above {self.rate:.2g} the loss of the dense network, or the mean, rises clearly"
        if (self.fell or self.capped) and self.rate <= self.rates[0]:
            said += f"; it is the lowest rate of the test: try suggest_lr(lowest={self.rates[0] / FACTOR:.2g})"
        elif self.fell and not self.capped and (smooth[-1] == min(smooth) or self.rate >= self.rates[-1]):
            said += f"; it was still falling there: try suggest_lr(highest={self.rates[-1] * FACTOR:.2g})"
        return said


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
            beginning, or that rises clearly at every rate; says what to type.
    """
    check_numbers("suggest_lr: ", steps=steps, lowest=lowest, highest=highest)
    if steps is None or steps < 10:
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
            curve = _measure(session, optimization, rates)
    finally:
        with torch.no_grad():
            for parameter, value, gradient in foreign:
                parameter.copy_(value)
                parameter.grad = gradient
    if not math.isfinite(curve.before):
        raise TrainingError(
            f"the training loss is {curve.before} before the first step, so there is no rate to suggest: check the "
            "model's output and the loss function on the first batch of train_loader"
        )
    found = curve.suggestion(start)
    if found is None:
        raise TrainingError(
            f"the loss ({curve.before:.4g} before the first step) rose clearly at the lowest rate, {lowest:.2g}: write "
            f"suggest_lr(lowest={lowest / FACTOR:.2g})"
        )
    rate, fell, capped = found
    return LearningRateSuggestion(rate, curve.rates, curve.losses, type(optimization.optimizer).__name__, fell, capped)


def _rate_of(optimizer: Optimizer) -> float:
    rate = optimizer.param_groups[0].get("lr")
    if rate is None or not 0 < float(rate) < math.inf:
        name = type(optimizer).__name__
        raise TrainingError(
            f"suggest_lr() changes the rate of an optimizer, and {name} has lr={shortened(rate)}: give {name} a "
            'learning rate above 0, or write optimizer="sgd" or optimizer="adamw"'
        )
    return float(rate)


def _measure(session: Session, optimization: Optimization, rates: Sequence[float]) -> RateCurve:
    """The loss before the first step, then rates and the losses at them, until one is not finite or has diverged."""
    assert session.execution is not None
    stepper = Stepper.of(session.net, session.execution, session.options, session.classes)
    round_ = session.options.first_round
    groups = optimization.optimizer.param_groups
    first = [group["lr"] for group in groups]
    batches, names = _batches(session), _networks(session, round_)

    def losses() -> tuple[float, float]:
        each = [_mean_loss(session, stepper, name, batches) for name in names]
        return math.fsum(each) / len(each), each[0]

    before, every = losses(), max(1, round(len(rates) / POINTS))
    measured: list[tuple[float, float, float]] = []
    session.modes.apply()
    shares, session.shares = session.shares, copy.deepcopy(session.shares)
    try:
        for i, rate in enumerate(rates):
            for group, own in zip(groups, first, strict=True):
                group["lr"] = own * (rate / float(first[0]))
            if not _trained(session, stepper, optimization, round_, i):
                break
            if (i + 1) % every:
                continue
            mean, dense = losses()
            if not math.isfinite(mean):
                break
            measured.append((rate, mean, dense))
            if mean > DIVERGED * before[0]:
                break
    finally:
        session.shares = shares
        session.data.stream.close()
    columns = [tuple(column) for column in zip(*measured, strict=True)] or [(), (), ()]
    return RateCurve(*before, *columns)


def _trained(session: Session, stepper: Stepper, optimization: Optimization, round_: int, i: int) -> bool:
    """Make a step; whether its losses are finite."""
    session.position.step = i
    drawn, _ = next_batches(session)
    step = session.step_at(round_, i % max(1, session.options.steps_of(round_)))
    if session.shares is not None:  # or the network that is owed most would be trained in every step
        session.shares.give(one.subnet for one in step.passes)
    session.seed("range test", i)
    result = stepper.step(step, drawn, optimization.optimizer, None, optimization.scaler)
    return all(bool(value.isfinite()) for value in result.losses.values())


def _networks(session: Session, round_: int) -> list[str]:
    """The dense network first, and of every pattern the subnetwork of the middle level: about all of them."""
    return [DENSE, *(names[len(names) // 2] for names in session.networks(round_).values() if names)]


def _batches(session: Session) -> list[object]:
    batches = list(session.data.recalibration)  # on the device
    counts = itertools.accumulate(map(examples, batches))
    enough = next((i + 1 for i, count in enumerate(counts) if count >= EXAMPLES), BATCHES)
    return batches[: min(enough, BATCHES)]


def _mean_loss(session: Session, stepper: Stepper, name: str, batches: Sequence[object]) -> float:
    losses: list[Tensor] = []
    for i, batch in enumerate(batches):
        session.seed("range test", "loss", i)  # the same dropout every time
        losses.append(stepper.loss(name, batch))
    return float(torch.stack([loss.double() for loss in losses]).mean())
