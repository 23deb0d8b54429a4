"""Learning rates."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from cocktailsdk.training.schedules import ScheduleFactory, constant, cosine, cosine_restarts


def rates(factory: ScheduleFactory, steps: int, lr: float = 0.1) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    schedule = factory(optimizer, steps)
    out = []
    for _ in range(steps):
        out.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return out


def test_the_papers_schedule_restarts_every_ten_epochs_after_a_hundred() -> None:
    found = rates(cosine_restarts(), 1500)  # ten steps an epoch
    assert found[0] == pytest.approx(0.1)
    assert found[500] == pytest.approx(0.001 + (0.1 - 0.001) / 2, rel=1e-3)
    assert found[999] == pytest.approx(0.001, abs=1e-4)
    for start in (1000, 1100, 1200, 1300, 1400):
        assert found[start] == pytest.approx(0.01, rel=1e-3)
        assert found[start + 50] == pytest.approx(0.0055, rel=1e-3)
        assert found[start + 99] == pytest.approx(0.001, rel=0.01)


def test_cosine_warms_up_and_ends_at_its_minimum() -> None:
    found = rates(cosine(warmup=0.1, minimum=0.02), 100)
    assert found[:10] == sorted(found[:10])
    assert max(found) == found[10] == pytest.approx(0.1)
    assert found[-1] == pytest.approx(0.1 * (0.02 + 0.98 * (1 + math.cos(math.pi * 89 / 90)) / 2))


@pytest.mark.parametrize("make", [cosine, cosine_restarts, constant])
def test_schedules_hold_for_a_single_step(make: Callable[[], ScheduleFactory]) -> None:
    assert rates(make(), 1) == [0.1]
