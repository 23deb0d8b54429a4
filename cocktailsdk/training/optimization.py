"""A round's optimizer and learning-rate schedule, which go together, and whether the user's can train a net."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ..errors import TrainingError
from ..utils.fsdp import is_sharded, like
from .options import Options

__all__ = ["OPTIMIZER_HINT", "SCHEDULE_HINT", "Optimization", "check_optimizer", "check_schedule"]

OPTIMIZER_HINT = (
    "give a function that makes one of them, for example optimizer=lambda parameters: torch.optim.SGD(parameters, "
    "lr=0.1)"
)
SCHEDULE_HINT = (
    "give a function that makes one of both, for example schedule=lambda optimizer, steps: "
    "torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)"
)


@dataclass(frozen=True)
class Optimization:
    """An optimizer and its schedule.

    Attributes:
        optimizer: Over the model's parameters that require a gradient.
        scheduler: Stepped after every optimizer step.
        scaler: Scales losses in half precision.
        foreign: Parameters that the optimizer trains beside the model's.
    """

    optimizer: Optimizer
    scheduler: LRScheduler
    scaler: torch.amp.GradScaler | None = None
    foreign: Sequence[nn.Parameter] = ()

    @classmethod
    def begin(cls, model: nn.Module, options: Options, round_: int, device: torch.device) -> Optimization:
        """A new one, as every round begins with."""
        optimizer = options.optimizer([p for p in model.parameters() if p.requires_grad])
        if round_ > options.rounds:
            for group in optimizer.param_groups:
                group["lr"] = group["lr"] * options.recipe.finishing_rate
        schedule = options.schedule(optimizer, options.schedule_steps(round_))
        own = {id(p) for p in model.parameters()}
        foreign = [p for group in optimizer.param_groups for p in group["params"] if id(p) not in own]
        return cls(optimizer, schedule, options.precision.scaler(device), foreign)

    @property
    def rate(self) -> float:
        """The learning rate of the first parameter group."""
        return float(self.scheduler.get_last_lr()[0])

    def state_dict(self) -> dict[str, Any]:
        """The states of all."""
        state: dict[str, Any] = {"optimizer": self.optimizer.state_dict(), "scheduler": self.scheduler.state_dict()}
        if self.foreign:
            state["foreign"] = [p.detach() for p in self.foreign]
        return state if self.scaler is None else {**state, "scaler": self.scaler.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        # an optimizer takes the tensors as its own, and goes on changing them
        self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
        for parameter, own in self.optimizer.state.items():
            for key, value in own.items():
                if is_sharded(parameter) and isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                    own[key] = like(parameter, value)
        self.scheduler.load_state_dict(state["scheduler"])
        if self.scaler is not None:
            self.scaler.load_state_dict(state["scaler"])
        with torch.no_grad():
            for parameter, value in zip(self.foreign, state.get("foreign", ()), strict=False):
                parameter.copy_(value)


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


def _needed(step: Callable[..., Any]) -> list[str]:
    """Arguments without which a method cannot be called."""
    try:
        parameters = inspect.signature(step).parameters.values()
    except (TypeError, ValueError):
        return []
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [f"a {p.name}" for p in parameters if p.default is p.empty and p.kind not in variadic]
