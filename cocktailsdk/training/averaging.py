"""An exponential moving average of the weights of a round."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import TrainingError
from ..utils.fsdp import sharded

__all__ = ["Average"]


class Average:
    """Averages the trained parameters, step after step.

    After step t of a round, ``average += (1 - d) (weights - average)`` with ``d = min(decay, (1 + t) / (10 + t))``:
    short rounds are not held back by the weights that they began with.

    Args:
        model: Its parameters that require a gradient are averaged; in single precision where they are of less.
        decay: What stays of the average in a step, once t is large.

    Raises:
        TrainingError: The model's weights are sharded.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        if sharded(model):
            raise TrainingError("ema cannot average sharded weights (FSDP2): leave it out, or train with DDP")
        self._model, self._decay = model, decay
        self._values: dict[str, Tensor] = {}
        self._steps = 0

    def _parameters(self) -> dict[str, Tensor]:
        return {name: p.detach() for name, p in self._model.named_parameters() if p.requires_grad}

    def begin(self) -> None:
        """Begin with the weights as they are."""
        self._values = {name: _single(p).clone() for name, p in self._parameters().items()}
        self._steps = 0

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights after an optimizer step."""
        self._steps += 1
        share = 1 - min(self._decay, (1 + self._steps) / (10 + self._steps))
        new = self._parameters()
        torch._foreach_lerp_(list(self._values.values()), [_single(new[name]) for name in self._values], share)

    @torch.no_grad()
    def load(self) -> None:
        """Give the model the average for its weights."""
        parameters = self._parameters()
        for name, value in self._values.items():
            parameters[name].copy_(value)

    def end(self) -> None:
        """Forget it."""
        self._values, self._steps = {}, 0

    @property
    def nbytes(self) -> int:
        """Bytes that it takes while a round trains."""
        return sum(max(p.element_size(), 4) * p.numel() for p in self._parameters().values())

    def state_dict(self) -> dict[str, Any]:
        """The average and its steps; not copied."""
        return {"steps": self._steps, "values": dict(self._values)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        device = {name: p.device for name, p in self._parameters().items()}
        self._values = {name: value.to(device[name], copy=True) for name, value in state["values"].items()}
        self._steps = state["steps"]


def _single(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.element_size() < 4 else tensor
