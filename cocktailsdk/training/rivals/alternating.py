"""AST: one network a mini-batch, masks that drop and regrow, corrected gradients (Yang et al., NeurIPS 2022)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ...errors import TrainingError
from ...graph import Weight
from ...masks import Mask
from ...masks.tiles import runs, unruns
from ...net.subnet_model import SubnetModel
from ..recipes.steps import ScheduleContext, Step, rotation
from ..step.hooks import StepContext, StepHook

__all__ = ["Alternating", "correct_gradients", "regrown"]


@dataclass(frozen=True)
class Alternating(StepHook):
    """The dense network and the round's subnets round robin, one a mini-batch.

    In every ``period``-th step of its own a subnet drops, in each layer, the smallest of its weights, and regrows as
    many where the gradient is largest.

    Attributes:
        regrow: Share of a layer's kept weights that are exchanged at first; it falls as a cosine.
        period: Steps of a subnet from one exchange to the next.
        until: Share of the round's steps after which masks stay as they are.
        correct: Whether, in every layer in which a gradient opposes the one before, its part along that is taken out.
    """

    regrow: float = 0.3
    period: int = 10
    until: float = 0.75
    correct: bool = True

    @cached_property
    def _previous(self) -> dict[str, Tensor]:
        """The gradients of the step before, by name: no field, as it is no setting of the method."""
        return {}

    @cached_property
    def _corrected(self) -> dict[str, Tensor]:
        """Those of this step, until it is made."""
        return {}

    def __call__(self, context: ScheduleContext) -> Step:
        """The step."""
        return rotation(context)

    def exchanged(self, context: ScheduleContext) -> float:
        """The share of each layer's kept weights that a step exchanges; 0 in most steps."""
        number, place = divmod(context.step, len(context.names) + 1)
        done = context.step / context.steps
        if not place or not number or number % self.period or done >= self.until:
            return 0.0
        return self.regrow * (1 + math.cos(math.pi * done / self.until)) / 2

    def on_round_start(self, context: ScheduleContext) -> None:
        """Forget the gradients of the round before."""
        self._previous.clear()

    def before_step(self, context: StepContext) -> None:
        """Refuse weights of which only a part is here."""
        if context.sharded and (self.correct or self.exchanged(context.schedule)):
            raise TrainingError("sharded weights (FSDP2) cannot regrow masks or correct gradients: train with DDP")

    def after_backward(self, context: StepContext, subnet: str) -> None:
        """Exchange weights, by the gradients that the masked ones have too."""
        if share := self.exchanged(context.schedule):
            context.set_mask(subnet, regrown(context.net, subnet, share))

    def before_update(self, context: StepContext) -> None:
        """Correct the gradients."""
        if self.correct:
            self._corrected.clear()  # of a skipped step, perhaps
            self._corrected.update(correct_gradients(context.gradients, self._previous))

    def after_update(self, context: StepContext) -> None:
        """Keep the gradients for the next step: those of a skipped step may not be finite."""
        self._previous.clear()
        self._previous.update(self._corrected)
        self._corrected.clear()

    def state_dict(self) -> dict[str, Any]:
        """The gradients of the step before, by the parameter's name."""
        return dict(self._previous)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self._previous.update(state)


@torch.no_grad()
def regrown(net: SubnetModel, name: str, share: float) -> Mask:
    """A subnet's mask after each layer dropped its smallest weights and regrew as many by gradient.

    Every layer keeps as many weights as it had; in N:M masks every run does.

    Args:
        net: Its parameters' gradients are those of the subnet, also of weights that it masks. Dense is active.
        name: The subnet, of the pattern ``"unstructured"`` or ``"n:m"``.
        share: Of a layer's kept weights, or of its runs, how many are exchanged.

    Raises:
        TrainingError: The subnet is of another pattern.
    """
    subnet, mask = net.subnet(name), net.masks[name]
    if subnet.pattern not in ("unstructured", "n:m"):
        raise TrainingError(f"single weights are dropped and regrown in unstructured and n:m masks, not in {name!r}")
    parameters = dict(net.model.named_parameters())
    out = dict(mask.elements)
    for weight in net.eligible:
        gradient = parameters[weight.name].grad
        if weight.name not in out or gradient is None:
            continue
        now = out[weight.name].to(gradient.device)
        value = net.dense_tensor(weight.name)
        if subnet.pattern == "n:m":
            new = _exchanged_in_runs(weight, now, value, gradient, share, subnet.options["m"])
        else:
            new = _exchanged(now, value, gradient, share)
        out[weight.name] = new.cpu()
    return Mask(out, mask.removed, mask.experts)


def _exchanged(
    mask: Bool[Tensor, "..."], value: Float[Tensor, "..."], gradient: Float[Tensor, "..."], share: float
) -> Bool[Tensor, "..."]:
    flat = mask.flatten().clone()
    inside, outside = flat.nonzero()[:, 0], (~flat).nonzero()[:, 0]
    count = min(round(share * len(inside)), len(outside))
    drop = value.flatten()[inside].abs().argsort(stable=True)[:count]
    grow = gradient.flatten()[outside].abs().argsort(descending=True, stable=True)[:count]
    flat[inside[drop]], flat[outside[grow]] = False, True
    return flat.reshape(mask.shape)


def _exchanged_in_runs(
    weight: Weight, mask: Tensor, value: Tensor, gradient: Tensor, share: float, m: int
) -> Bool[Tensor, "..."]:
    """In the runs whose smallest kept weight is smallest, it makes room for the masked one of largest gradient."""
    keep = runs(weight, mask, m)
    shape = keep.shape
    keep = keep.reshape(-1, m).clone()
    smallest = runs(weight, value, m).reshape(-1, m).abs().masked_fill(~keep, torch.inf).min(1)
    largest = runs(weight, gradient, m).reshape(-1, m).abs().masked_fill(keep, -1.0).max(1)
    chosen = smallest.values.argsort(stable=True)[: round(share * len(keep))]
    keep[chosen, smallest.indices[chosen]] = False
    keep[chosen, largest.indices[chosen]] = True
    return unruns(weight, keep.reshape(shape), True)


@torch.no_grad()
def correct_gradients(gradients: Mapping[str, Tensor], previous: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Where a layer's gradient g opposes the step before's, p, take its part along that out: g - (g·p / p·p) p.

    Args:
        gradients: By parameter; changed in place.
        previous: The gradients of the step before, as this function returned them.

    Returns:
        Copies of the corrected gradients.
    """
    for name, g in gradients.items():
        if (p := previous.get(name)) is not None:
            along, square = (g * p).sum(), p.square().sum()
            # torch.where instead of an if: no waiting for the device. 0 where the two agree, and where p is 0
            g.sub_(p * torch.where(along < 0, along / square, torch.zeros_like(along)))
    return {name: g.clone() for name, g in gradients.items()}
