"""Losses and weights that stop being finite: found without waiting for the device, and never saved."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ...errors import TrainingError
from ...masks import Mask
from ...net.subnet_model import SubnetModel
from ...utils.batchnorm import running_norms
from ...utils.fsdp import local
from ...utils.nested import tensors_in
from ..recipes.steps import Step

__all__ = ["LossWatch", "Skips", "StepLocation", "StepSnapshot", "all_finite", "has_nonfinite", "not_finite"]

log = logging.getLogger(__name__)

LIMIT = 256
SECONDS = 5.0


@dataclass(frozen=True)
class StepLocation:
    """Where in a run a step is.

    Attributes:
        round: Its round.
        epoch: Its epoch in the round, from 0.
        step: Its number in the epoch, from 0.
        batch: The index of its batch in the pass over the loader, from 0.
        done: Optimizer steps of the whole run before it.
    """

    round: int
    epoch: int
    step: int
    batch: int
    done: int

    def __str__(self) -> str:
        return (
            f"in round {self.round}, epoch {self.epoch}, step {self.step}, on batch {self.batch} of the loader "
            f"(all from 0; step {self.done} of the run)"
        )


def has_nonfinite(batch: Any) -> bool:
    """Whether a batch has floating-point values that are not finite."""
    return not all(bool(t.isfinite().all()) for t in tensors_in(batch) if t.is_floating_point())


class LossWatch:
    """Finds the first loss that is not finite, without waiting for the device in every step.

    Losses are kept where they are, and looked at together: before anything is saved, and else every few hundred steps
    or seconds. On the CPU, where nothing is waited for, every step.

    Args:
        device: The losses'.
        limit: Look at so many at the latest.
        seconds: Look so often at the latest.
    """

    def __init__(self, device: torch.device, limit: int | None = None, seconds: float = SECONDS) -> None:
        self._limit = limit or (1 if device.type == "cpu" else LIMIT)
        self._seconds = seconds
        self._losses: list[tuple[StepLocation, str, Float[Tensor, ""]]] = []
        self._looked = time.monotonic()

    def add(self, location: StepLocation, losses: Mapping[str, Float[Tensor, ""]]) -> str | None:
        """Take a step's losses, by network; says what is wrong where it looked, as :meth:`look` does."""
        self._losses += [(location, name, loss) for name, loss in losses.items()]
        if len(self._losses) < self._limit and time.monotonic() - self._looked < self._seconds:
            return None
        return self.look()

    def look(self) -> str | None:
        """Say which of the losses taken since the last look was the first that is not finite; ``None`` if all are."""
        losses, self._losses, self._looked = self._losses, [], time.monotonic()
        if not losses:
            return None
        values = torch.stack([loss.float() for _, _, loss in losses]).tolist()
        for (location, name, _), value in zip(losses, values, strict=True):
            if value - value != 0:  # inf - inf and nan - nan are nan
                return f"the training loss of {name} became {value} {location}"
        return None


@torch.no_grad()
def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether no number is infinite or none; one look at the device for all tensors, and no memory of their size."""
    ends: list[Tensor] = []
    for tensor in map(local, tensors):
        if tensor.is_complex():
            tensor = torch.view_as_real(tensor)
        if tensor.is_floating_point() and tensor.numel():
            ends += [end.float() for end in torch.aminmax(tensor)]
    return not ends or bool(torch.stack(ends).isfinite().all())


def not_finite(model: nn.Module) -> list[str]:
    """Names of what trained to numbers that are not finite: parameters, and running batch-norm statistics.

    Others (an attention mask of -inf, say) are the model's own business.
    """
    trained: dict[str, Tensor] = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for path, norm in running_norms(model).items():
        trained.update({f"{path}.{n}".lstrip("."): b for n, b in norm._buffers.items() if b is not None})
    if all_finite(trained.values()):
        return []
    return [name for name, tensor in trained.items() if not all_finite([tensor])]


class StepSnapshot:
    """What a step changes before the optimizer steps, to be restored if the step is skipped.

    These are all buffers (batch-norm statistics), the statistics of the step's subnets, and masks that hooks set.

    Args:
        net: The networks; the dense one is active.
        step: What is about to be done.
    """

    def __init__(self, net: SubnetModel, step: Step) -> None:
        self._net = net
        self._buffers = [(buffer, buffer.detach().clone()) for buffer in net.model.buffers()]
        self._statistics = {name: net.statistics.get(name) for name in step.subnets}
        self._masks: dict[str, Mask] = {}

    def add_mask(self, name: str) -> None:
        """Take in a subnet's mask, which is about to change."""
        if name not in self._masks:
            self._masks[name] = self._net.masks[name]
            self._statistics.setdefault(name, self._net.statistics.get(name))

    @torch.no_grad()
    def restore(self) -> None:
        """Restore all, and drop the gradients."""
        net = self._net
        for buffer, value in self._buffers:
            buffer.copy_(value)
        for name, mask in self._masks.items():
            net.set_mask(name, mask)
        for name, own in self._statistics.items():  # after the masks: set_mask drops statistics
            net.statistics.pop(name, None)
            if own is not None:
                net.statistics[name] = own
        for parameter in net.model.parameters():
            parameter.grad = None


class Skips:
    """Skips optimizer steps whose losses or gradients are not finite, and counts them.

    Attributes:
        in_a_row: How many were skipped since the last that was made.
        waiting: Those that no event has reported yet: where, which network, and its loss.
    """

    MOST = 25
    """In a row; then the run stops, since this is no accident."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self._parameters = list(parameters)
        self.in_a_row = 0
        self.waiting: list[tuple[StepLocation, str, float]] = []

    def allows(self, losses: Mapping[str, Float[Tensor, ""]], scaled: bool = False) -> bool:
        """Whether a step may be made. Waits for the device.

        Args:
            losses: By network.
            scaled: Whether gradients are those of scaled losses: they may overflow, and the scaler checks them.
        """
        gradients = [] if scaled else [p.grad for p in self._parameters if p.grad is not None]
        return all_finite([*losses.values(), *gradients])

    def note(self, location: StepLocation, losses: Mapping[str, Float[Tensor, ""]], standing: str) -> None:
        """Count a skipped step, and log the network to blame and its loss.

        Args:
            location: Of the step.
            losses: By network.
            standing: What is said of the last state, where the run stops.

        Raises:
            TrainingError: Too many were skipped in a row.
        """
        self.in_a_row += 1
        values = {name: float(loss) for name, loss in losses.items()}
        name, value = next(((n, v) for n, v in values.items() if v - v != 0), next(iter(values.items())))
        self.waiting.append((location, name, value))
        if self.in_a_row >= self.MOST:
            raise TrainingError(
                f'{self.in_a_row} steps in a row were left out (on_nan="skip"), the last {location}, since the loss of '
                f"{name} was {value} or its gradients were not finite: lower the learning rate, or look for values in "
                f"the data that are not finite. {standing}"
            )
        log.warning(
            "left out a step %s: the loss of %s was %g, or its gradients were not finite", location, name, value
        )
