"""Whether what the user's optimizer and schedule factories make can train a net."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from ..errors import TrainingError

__all__ = ["OPTIMIZER_HINT", "SCHEDULE_HINT", "check_optimizer", "check_schedule", "foreign_parameters"]

OPTIMIZER_HINT = (
    "give a function that makes one of them, for example optimizer=lambda parameters: torch.optim.SGD(parameters, "
    "lr=0.1)"
)
SCHEDULE_HINT = (
    "give a function that makes one of both, for example schedule=lambda optimizer, steps: "
    "torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)"
)


def check_optimizer(optimizer: Any, model: nn.Module) -> None:
    """Refuse optimizers that the trainer cannot step, and such that train nothing of the model.

    Raises:
        TrainingError: Says what was found and what to give instead.
    """
    name = type(optimizer).__name__
    if not all(hasattr(optimizer, part) for part in ("param_groups", "step", "zero_grad", "state_dict", "state")):
        raise TrainingError(f"optimizer(parameters) must return an Optimizer, got {name}")
    inner: Any = getattr(optimizer, "optimizer", None)  # of wrappers, which take a closure for their own part
    if needed := _needed(optimizer.step) or (_needed(inner.step) if hasattr(inner, "step") else []):
        raise TrainingError(
            f"{name}.step() needs {', '.join(needed)}, and CoTrainer steps without: give an optimizer that needs no "
            "closure, for example optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9)"
        )
    own = {id(p) for p in model.parameters()}
    if not any(id(p) in own for group in optimizer.param_groups for p in group["params"]):
        raise TrainingError(
            f"optimizer(parameters) returned {name} over none of the net's parameters, so nothing would be trained: "
            "pass on what it is given, for example optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1)"
        )


def check_schedule(schedule: Any) -> None:
    """Refuse schedules that cannot be stepped after every optimizer step.

    Raises:
        TrainingError: Says what was found and what to give instead.
    """
    name = type(schedule).__name__
    if not all(hasattr(schedule, part) for part in ("step", "state_dict", "get_last_lr")):
        raise TrainingError(f"schedule(optimizer, steps) must return a torch learning-rate scheduler, got {name}")
    if needed := _needed(schedule.step):
        raise TrainingError(
            f"{name}.step() needs {', '.join(needed)}, and CoTrainer steps schedules after every optimizer step, "
            "without: give one that counts steps, for example schedule=cocktailsdk.training.schedules.cosine()"
        )


def foreign_parameters(optimizer: Any, model: nn.Module) -> list[nn.Parameter]:
    """Parameters that an optimizer trains beside the model's (of a loss, say), in its order."""
    own = {id(p) for p in model.parameters()}
    groups: Iterable[Any] = optimizer.param_groups
    return [p for group in groups for p in group["params"] if id(p) not in own]


def _needed(step: Callable[..., Any]) -> list[str]:
    """Arguments without which a method cannot be called."""
    try:
        parameters = inspect.signature(step).parameters.values()
    except (TypeError, ValueError):
        return []
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [f"a {p.name}" for p in parameters if p.default is p.empty and p.kind not in variadic]
