"""Dynamic distillation: the dense network, as it stands, teaches the sparse ones (paper, section 3.2).

On a sparse step the loss is ``(1-w) L(S(x), y) + w L(S(x), softmax(D(x)))`` with ``w = 0.5`` and temperature 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import TrainingError
from .forward import LossFn, loss_of, output_tensor

__all__ = ["Classes", "DistillFn", "Distillation", "find_classes", "soft_cross_entropy", "untouched_buffers"]

DistillFn = Callable[[Any, Any], Tensor]


@dataclass(frozen=True)
class Classes:
    """Where a model's output holds class logits, and which of them count.

    Attributes:
        axis: The class axis: 1 as in ``F.cross_entropy``, or -1 for sequences.
        shift: Whether position ``t`` predicts the label at ``t+1`` (causal language models that shift by
            themselves).
    """

    axis: int
    shift: bool = False

    def positions(
        self, logits: Float[Tensor, "..."], target: Int[Tensor, "..."]
    ) -> tuple[Float[Tensor, "n classes"], Int[Tensor, " n"]]:
        """Logits and labels as a list of positions."""
        if self.shift:
            logits, target = logits[..., :-1, :], target[..., 1:]
        logits = logits.movedim(self.axis, -1)
        return logits.reshape(-1, logits.shape[-1]), target.reshape(-1)


def find_classes(output: Any, target: Any, loss: Float[Tensor, ""]) -> Classes | None:
    """Find where an output holds class logits, from shapes and from what the loss computed.

    The target must hold integer labels with the logits' shape but for the class axis. Where several readings fit
    (sequences), the one whose cross-entropy is the loss is taken.

    Args:
        output: Of the model; see :func:`~cocktailsdk.training.forward.output_tensor`.
        target: Of the batch.
        loss: What the user's loss, or the model's, made of both.

    Returns:
        The reading, or ``None`` where there is none: not a classification, or not to be told from outside.
    """
    logits = output_tensor(output)
    if logits is None or not logits.is_floating_point() or logits.ndim < 2 or not isinstance(target, Tensor):
        return None
    if target.is_floating_point() or target.dtype == torch.bool:
        return None
    fits = []
    for classes in (Classes(1), Classes(-1), Classes(-1, shift=True)):
        if classes.axis == -1 and logits.ndim == 2:
            continue  # the same as axis 1
        shape = list(logits.shape)
        shape.pop(classes.axis)
        if shape == list(target.shape) and int(target.max()) < logits.shape[classes.axis]:
            fits.append(classes)
    if len(fits) == 1:
        return fits[0]
    wanted = float(loss.detach())
    off = {classes: abs(_cross_entropy(logits, target, classes) - wanted) for classes in fits}
    # the closest, not the first that is close: with untrained weights all readings are
    best = min(fits, key=off.__getitem__, default=None)
    return best if best is not None and off[best] <= 1e-2 * abs(wanted) + 1e-4 else None


@torch.no_grad()
def _cross_entropy(logits: Float[Tensor, "..."], target: Int[Tensor, "..."], classes: Classes) -> float:
    rows, labels = classes.positions(logits.detach().float(), target)
    return float(F.cross_entropy(rows, labels))


def soft_cross_entropy(
    student: Float[Tensor, "..."], teacher: Float[Tensor, "..."], target: Int[Tensor, "..."], classes: Classes
) -> Float[Tensor, ""]:
    """Mean cross-entropy of the student against the teacher's probabilities.

    Args:
        student: Logits.
        teacher: Logits of the same shape.
        target: Labels; positions with a negative label (ignored ones) do not count.
        classes: Where the classes are.
    """
    s, labels = classes.positions(student, target)
    t, _ = classes.positions(teacher, target)
    wide = torch.promote_types(s.dtype, torch.float32)  # float64 stays float64
    each = F.cross_entropy(s.to(wide), t.to(wide).softmax(-1), reduction="none")
    counts = (labels >= 0).to(each.dtype)
    return (each * counts).sum() / counts.sum().clamp(min=1)


@dataclass(frozen=True)
class Distillation:
    """What a sparse network learns: from the labels, and from the dense one.

    Attributes:
        weight: Share of what the dense network says; at 0 there is no teacher.
        fn: ``fn(student_output, teacher_output)``, or ``None`` for soft cross-entropy.
        classes: Where the output holds class logits, if it does.
    """

    weight: float
    fn: DistillFn | None = None
    classes: Classes | None = None

    def __call__(
        self, loss: Float[Tensor, ""], output: Any, teacher: Any, target: Any, loss_fn: LossFn | None = None
    ) -> Float[Tensor, ""]:
        """The loss of a sparse turn.

        Args:
            loss: From the labels.
            output: The sparse network's.
            teacher: The dense network's for the same batch.
            target: The batch's labels.
            loss_fn: What computed the loss, for errors.

        Raises:
            TrainingError: There is no soft target for such outputs, or ``fn`` returns no scalar.
        """
        if not self.weight:
            return loss
        return (1 - self.weight) * loss + self.weight * self._soft(output, teacher, target, loss_fn)

    def _soft(self, output: Any, teacher: Any, target: Any, loss_fn: LossFn | None) -> Float[Tensor, ""]:
        if self.fn is not None:
            return loss_of(output, teacher, self.fn, "distill_fn")
        student, dense = output_tensor(output), output_tensor(teacher)
        if self.classes is None or student is None or dense is None:
            raise no_soft_loss(loss_fn, output)
        return soft_cross_entropy(student, dense, target, self.classes)


def no_soft_loss(loss_fn: Any, output: Any) -> TrainingError:
    """The error for a loss that cannot take a teacher's output as its target."""
    loss = "the model's own loss" if loss_fn is None else getattr(loss_fn, "__name__", type(loss_fn).__name__)
    return TrainingError(
        f"distillation needs distill_fn(student_output, teacher_output) -> scalar loss: {loss} on an output of type "
        f"{type(output).__name__} is no classification of integer labels, so there is no soft target to be found by "
        "itself; distill_weight=0 trains without distillation"
    )


@contextmanager
def untouched_buffers(model: nn.Module) -> Iterator[None]:
    """Let a forward pass in train mode leave no trace in the model's buffers (batch-norm statistics above all)."""
    held = [
        (module, name, buffer)
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    before = [buffer.clone() for _, _, buffer in held]
    try:
        yield
    finally:
        with torch.no_grad():
            for (module, name, buffer), value in zip(held, before, strict=True):
                buffer.copy_(value)
                module._buffers[name] = buffer
