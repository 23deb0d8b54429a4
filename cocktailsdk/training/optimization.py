"""A round's optimizer and learning-rate schedule, which go together."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ..utils.fsdp import is_sharded, like
from .factories import foreign_parameters
from .options import Options

__all__ = ["Optimization"]


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
        foreign = foreign_parameters(optimizer, model)
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
