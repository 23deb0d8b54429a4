"""One optimizer step of the dense network or of a sparse one."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.optim import Optimizer

from ..net import CocktailNet
from ..patterns.base import DENSE
from .distill import Classes, DistillFn, no_soft_loss, soft_cross_entropy, untouched_buffers
from .forward import ForwardFn, LossFn, loss_of, output_tensor

__all__ = ["Stepper"]


class Stepper:
    """Trains the networks that share the weights, a batch at a time.

    Args:
        net: The networks.
        forward: How a batch is used.
        loss_fn: The user's loss, or ``None`` for the model's own.
        distill_fn: ``distill_fn(student_output, teacher_output)``, or ``None`` for soft cross-entropy.
        distill_weight: Its share in the loss of a sparse step; at 0 there is no teacher.
        classes: Where the output holds class logits, if it does.
    """

    def __init__(
        self,
        net: CocktailNet,
        forward: ForwardFn,
        loss_fn: LossFn | None,
        distill_fn: DistillFn | None,
        distill_weight: float,
        classes: Classes | None,
    ) -> None:
        self._net = net
        self._forward = forward
        self._loss_fn = loss_fn
        self._distill_fn = distill_fn
        self._weight = distill_weight
        self._classes = classes
        self._parameters = dict(net.model.named_parameters())

    def step(self, name: str, batch: Any, optimizer: Optimizer) -> Float[Tensor, ""]:
        """Train one network on a batch.

        A sparse network's gradients reach only the weights it keeps. Momentum and weight decay go on moving the
        others, as published.

        Args:
            name: ``"dense"`` or a subnet's name. The dense network must be active, and is so again afterwards.
            batch: On the model's device.
            optimizer: Steps once.

        Returns:
            The loss that was trained, detached.
        """
        optimizer.zero_grad(set_to_none=True)
        if name == DENSE:
            output, target = self._forward(self._net.model, batch)
            loss = loss_of(output, target, self._loss_fn)
            loss.backward()
        else:
            teacher = self._teacher(batch)
            with self._net.using(name, statistics=False):
                output, target = self._forward(self._net.model, batch)
                loss = loss_of(output, target, self._loss_fn)
                if self._weight:
                    soft = self._distillation(output, teacher, target)
                    loss = (1 - self._weight) * loss + self._weight * soft
                loss.backward()
            self._mask_gradients(name)
        optimizer.step()
        return loss.detach()

    def _teacher(self, batch: Any) -> Any:
        """The dense network's output in train mode; it leaves no trace in gradients or statistics."""
        if not self._weight:
            return None
        with torch.no_grad(), untouched_buffers(self._net.model):
            output, _ = self._forward(self._net.model, batch)
        return output

    def _distillation(self, output: Any, teacher: Any, target: Any) -> Float[Tensor, ""]:
        if self._distill_fn is not None:
            return loss_of(output, teacher, self._distill_fn, "distill_fn")
        student, dense = output_tensor(output), output_tensor(teacher)
        if self._classes is None or student is None or dense is None:
            raise no_soft_loss(self._loss_fn, output)
        return soft_cross_entropy(student, dense, target, self._classes)

    def _mask_gradients(self, name: str) -> None:
        gradients, masks = [], []
        for key, mask in self._net.mask_tensors(name).items():
            parameter = self._parameters.get(key)
            if parameter is not None and parameter.grad is not None:
                gradients.append(parameter.grad)
                masks.append(mask)
        if gradients:
            torch._foreach_mul_(gradients, masks)
