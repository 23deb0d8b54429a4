"""An exponential moving average of the weights of a round."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ..errors import TrainingError
from ..utils.fsdp import sharded

__all__ = ["Average"]


class Average:
    """Averages the trained parameters, step after step, with :class:`torch.optim.swa_utils.AveragedModel`.

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
            raise TrainingError(
                "ExecutionSettings.ema_decay cannot average sharded weights (FSDP2): leave it out, or train with DDP"
            )
        self._model, self._decay = model, decay
        self.end()

    def begin(self) -> None:
        """Begin with the weights as they are."""
        parameters = self._parameters()
        self._names, self._trained = list(parameters), _Trained(parameters.values())
        self._average = AveragedModel(self._trained, multi_avg_fn=self._blend)
        for value in self._average.parameters():
            # In 16 bits, adding (1 - decay) of a small difference rounds to no change. AveragedModel (torch 2.14)
            # copies parameters in their own dtype, and only .data changes a parameter's dtype in place.
            if value.element_size() < 4:
                value.data = value.data.float()
        self._average.update_parameters(self._trained)  # the first update copies
        self._steps = 0

    def update(self) -> None:
        """Add the weights after an optimizer step."""
        self._steps += 1
        self._average.update_parameters(self._trained)

    def _blend(self, averages: Any, weights: Any, count: Tensor | int) -> None:
        # The count that AveragedModel gives is a tensor on the device, and reading it would wait for the device.
        decay = min(self._decay, (1 + self._steps) / (10 + self._steps))
        get_ema_multi_avg_fn(decay)(averages, weights, count)

    @torch.no_grad()
    def load(self) -> None:
        """Give the model the average for its weights."""
        for weight, value in zip(self._trained, self._average.parameters(), strict=True):
            weight.copy_(value)

    def end(self) -> None:
        """Free the average."""
        self._names, self._trained = [], _Trained()
        self._average = AveragedModel(self._trained)
        self._steps = 0

    def _parameters(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self._model.named_parameters() if p.requires_grad}

    @property
    def nbytes(self) -> int:
        """Bytes of the average while a round trains."""
        return sum(max(p.element_size(), 4) * p.numel() for p in self._parameters().values())

    def state_dict(self) -> dict[str, Any]:
        """The average by the parameters' names and its steps; not copied."""
        values = [value.detach() for value in self._average.parameters()]
        return {"steps": self._steps, "values": dict(zip(self._names, values, strict=True))}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        if not state["values"]:  # saved between rounds
            self.end()
            return
        self.begin()
        for name, value in zip(self._names, self._average.parameters(), strict=True):
            value.copy_(state["values"][name])
        self._steps = state["steps"]


class _Trained(nn.ParameterList):
    """The trained parameters of a model, shared with it; AveragedModel would copy and average the frozen ones, too."""

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """In the precision of the average, since AveragedModel groups the weights and the average by one dtype."""
        for parameter in super().parameters(recurse):
            yield parameter if parameter.element_size() >= 4 else parameter.float()  # type: ignore[misc]
