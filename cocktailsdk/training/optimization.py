"""A round's optimizer and learning-rate schedule, which go together."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from .options import Options

__all__ = ["Optimization"]


@dataclass(frozen=True)
class Optimization:
    """An optimizer and its schedule.

    Attributes:
        optimizer: Over the model's parameters that require a gradient.
        scheduler: Stepped after every optimizer step.
    """

    optimizer: Optimizer
    scheduler: LRScheduler

    @classmethod
    def begin(cls, model: nn.Module, options: Options, round_: int) -> Optimization:
        """A new one, as every round begins with."""
        optimizer = options.optimizer([p for p in model.parameters() if p.requires_grad])
        if round_ > options.rounds:
            for group in optimizer.param_groups:
                group["lr"] = group["lr"] * options.recipe.finishing_rate
        return cls(optimizer, options.schedule(optimizer, options.schedule_steps(round_)))

    @property
    def rate(self) -> float:
        """The learning rate of the first parameter group."""
        return float(self.scheduler.get_last_lr()[0])

    def state_dict(self) -> dict[str, Any]:
        """The states of both."""
        return {"optimizer": self.optimizer.state_dict(), "scheduler": self.scheduler.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        # an optimizer takes the tensors as its own, and goes on changing them
        self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
        self.scheduler.load_state_dict(state["scheduler"])
