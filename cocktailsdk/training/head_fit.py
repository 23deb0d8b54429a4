"""Fits a linear classifier head to features: a convex problem, solved by L-BFGS without passes of the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

__all__ = ["Features", "HardLoss", "Head", "find_hard_loss", "fit_head", "head_loss"]

TEMPERATURE = 4.0
"""Of the soft targets. On ResNet-20, heads fitted with 1, 2 and 4 are within 0.4 points; 4 is the best by a little."""
RIDGE = 1e-3
"""Weight of the squared distance to the trained head, which keeps few examples from being fitted exactly."""
ITERATIONS = 40
CLOSE = 5e-3
"""A loss is a cross-entropy if it differs from that by so little, relatively: logits may be of 16 bits."""
FITTED = 0.75
"""Part of the examples that a head is tried on, before it is fitted to all of them: see :func:`fit_head`."""


@dataclass(frozen=True)
class Head:
    """A linear layer from features to logits.

    Attributes:
        weight: Shape (classes, features).
        bias: Shape (classes); ``None`` for a layer without one.
    """

    weight: Float[Tensor, "classes features"]
    bias: Float[Tensor, " classes"] | None

    def __call__(self, features: Float[Tensor, "n features"]) -> Float[Tensor, "n classes"]:
        """Logits."""
        return F.linear(features, self.weight, self.bias)


@dataclass(frozen=True)
class HardLoss:
    """The user's loss from the labels: a cross-entropy.

    Attributes:
        weight: Of each class; ``None`` for equal weights.
        label_smoothing: As of :func:`torch.nn.functional.cross_entropy`.
    """

    weight: Float[Tensor, " classes"] | None = None
    label_smoothing: float = 0.0

    def __call__(self, logits: Float[Tensor, "n classes"], labels: Int[Tensor, " n"]) -> Float[Tensor, ""]:
        """The mean over examples."""
        weight = None if self.weight is None else self.weight.to(logits)
        return F.cross_entropy(logits, labels, weight, label_smoothing=self.label_smoothing)


@dataclass(frozen=True)
class Features:
    """What the head of one network saw, and what it should have said.

    Attributes:
        inputs: The head's inputs.
        labels: Class labels.
        teacher: The teacher's logits; ``None`` without one.
        mask: 0 where the network masks the head's weight, else 1, in a shape that broadcasts to the weight's;
            ``None`` if it masks nothing there.
        hard: The loss from the labels.
    """

    inputs: Float[Tensor, "n features"]
    labels: Int[Tensor, " n"]
    teacher: Float[Tensor, "n classes"] | None
    mask: Tensor | None = None
    hard: HardLoss = HardLoss()

    def part(self, begin: int, end: int) -> Features:
        """Some of the examples."""
        teacher = None if self.teacher is None else self.teacher[begin:end]
        return replace(self, inputs=self.inputs[begin:end], labels=self.labels[begin:end], teacher=teacher)


def head_loss(head: Head, features: Features, distillation: float) -> Float[Tensor, ""]:
    """``(1 - w)`` loss from the labels + ``w T²`` KL to the teacher.

    Args:
        head: Its weight is masked as the network's is.
        features: Of one network.
        distillation: The weight w, in [0, 1]; without a teacher the loss is that from the labels.
    """
    weight = head.weight if features.mask is None else head.weight * features.mask
    logits = F.linear(features.inputs, weight, head.bias)
    hard = features.hard(logits, features.labels)
    if features.teacher is None or not distillation:
        return hard
    student, teacher = ((z / TEMPERATURE).log_softmax(-1) for z in (logits, features.teacher))
    soft = TEMPERATURE**2 * F.kl_div(student, teacher, reduction="batchmean", log_target=True)
    return (1 - distillation) * hard + distillation * soft


def fit_head(trained: Head, networks: Sequence[Features], distillation: float) -> Head | None:
    """A head fitted to the features of one network or of several.

    It is first fitted to three quarters of the examples. If its loss on the others is not below that of the trained
    head, there are too few examples for so large a head.

    Args:
        trained: The head that co-training ended with.
        networks: By network, with the same examples.
        distillation: As of :func:`head_loss`.

    Returns:
        The head fitted to all examples; ``None`` if the trained one is better.
    """
    count = len(networks[0].labels)
    split = int(FITTED * count)
    if split < 1 or split == count:
        return None

    def loss(head: Head, begin: int, end: int) -> Tensor:
        losses = [head_loss(head, one.part(begin, end), distillation) for one in networks]
        return torch.stack(losses).mean()

    def better(head: Head, begin: int, end: int) -> bool:
        with torch.no_grad():
            return bool(loss(head, begin, end) < loss(trained, begin, end))  # False also for NaN

    if not better(_minimum(trained, lambda head: loss(head, 0, split)), split, count):
        return None
    fitted = _minimum(trained, lambda head: loss(head, 0, count))
    return fitted if better(fitted, 0, count) else None  # L-BFGS without a line search may diverge


def _minimum(start: Head, loss: Callable[[Head], Tensor]) -> Head:
    """The head with the smallest loss plus ridge penalty, from where it starts."""
    weight = start.weight.detach().clone().requires_grad_()
    bias = None if start.bias is None else start.bias.detach().clone().requires_grad_()
    head = Head(weight, bias)
    optimizer = torch.optim.LBFGS([weight] if bias is None else [weight, bias], max_iter=ITERATIONS)

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(head) + RIDGE * (weight - start.weight.detach()).pow(2).sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(closure)
    return Head(weight.detach(), None if bias is None else bias.detach())


def find_hard_loss(
    loss_fn: Any, logits: Float[Tensor, "n classes"], labels: Int[Tensor, " n"], loss: Float[Tensor, ""]
) -> HardLoss | None:
    """The cross-entropy that a loss function is, as its attributes say and its value confirms.

    A head that is fitted with another loss would undo what training did: equal weights make a classifier that was
    trained for a rare class forget it.

    Args:
        loss_fn: The user's; ``None`` for the model's own.
        logits: Of a batch, only those that count.
        labels: Of these.
        loss: What the loss function made of both.

    Returns:
        ``None`` if the loss is something else, or cannot be told from outside.
    """
    weight, smoothing = _setting(loss_fn, "weight"), _setting(loss_fn, "label_smoothing", "smoothing")
    found = HardLoss()
    if isinstance(weight, Tensor) and weight.shape == logits.shape[-1:]:
        found = replace(found, weight=weight.detach().float().cpu())
    if isinstance(smoothing, float) and 0 < smoothing < 1:
        found = replace(found, label_smoothing=smoothing)
    wanted = float(loss)
    off = abs(float(found(logits.float(), labels)) - wanted)
    return found if off <= CLOSE * abs(wanted) + 1e-4 else None


def _setting(loss_fn: Any, *names: str) -> Any:
    """A setting of a loss function: an attribute of it, or an argument that is bound."""
    while isinstance(loss_fn, partial):
        if (bound := next((loss_fn.keywords[name] for name in names if name in loss_fn.keywords), None)) is not None:
            return bound
        loss_fn = loss_fn.func
    return next((value for name in names if (value := getattr(loss_fn, name, None)) is not None), None)
