"""Learning-rate schedules, counted in optimizer steps.

A schedule factory is called as ``factory(optimizer, steps)`` once a round, with the number of optimizer steps
that the round will make, and returns any ``torch.optim.lr_scheduler.LRScheduler``. The trainer calls the scheduler's
``step()`` after *every optimizer step*.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

__all__ = ["ScheduleFactory", "constant", "cosine", "cosine_restarts"]

ScheduleFactory = Callable[[Optimizer, int], LRScheduler]


def cosine(*, warmup: float = 0.0, minimum: float = 0.0) -> ScheduleFactory:
    """Cosine decay to a minimum, after a linear warm-up.

    Args:
        warmup: Share of the steps over which the rate rises linearly.
        minimum: Where it ends, as a share of the optimizer's rate.
    """

    def factory(optimizer: Optimizer, steps: int) -> LRScheduler:
        rising = round(warmup * steps)

        def rate(step: int) -> float:
            if step < rising:
                return (step + 1) / (rising + 1)
            done = min((step - rising) / max(steps - rising, 1), 1.0)
            return minimum + (1 - minimum) * (1 + math.cos(math.pi * done)) / 2

        return LambdaLR(optimizer, rate)

    return factory


def cosine_restarts(
    *, first: float = 100 / 150, then: float = 10 / 150, restart: float = 0.1, minimum: float = 0.01
) -> ScheduleFactory:
    """Cosine decay with warm restarts: the paper's schedule (section 4.1; the defaults are its CIFAR-10 settings).

    Those are 100 of 150 epochs from 0.1 to 0.001, then every 10 epochs from 0.01 to 0.001.

    Args:
        first: Length of the first decay, as a share of all steps.
        then: Length of every later one.
        restart: Where later decays begin, as a share of the optimizer's rate.
        minimum: Where every decay ends, likewise.
    """

    def factory(optimizer: Optimizer, steps: int) -> LRScheduler:
        longest, later = max(1, round(first * steps)), max(1, round(then * steps))

        def rate(step: int) -> float:
            start, phase = 1.0, step / longest
            if step >= longest:
                start, phase = restart, (step - longest) % later / later
            return minimum + (start - minimum) * (1 + math.cos(math.pi * phase)) / 2

        return LambdaLR(optimizer, rate)

    return factory


def constant() -> ScheduleFactory:
    """The optimizer's own rate throughout."""
    return lambda optimizer, steps: LambdaLR(optimizer, lambda step: 1.0)
