"""Dynamic distillation: the dense network, as it stands, teaches the sparse ones (paper, section 3.2).

Which labels a loss leaves out (``ignore_index``) is read from the loss function, or seen from what it computed.

On a sparse step the loss is ``(1-w) L(S(x), y) + w L(S(x), softmax(D(x)))`` with ``w = 0.5`` and temperature 1.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from ...errors import TrainingError
from ...utils.blame import blamed
from ...utils.losses import LossFn, loss_of
from ...utils.nested import form_of
from .forward import output_tensor

__all__ = [
    "Classes",
    "DistillFn",
    "Distillation",
    "check_teacher",
    "counted",
    "find_classes",
    "soft_cross_entropy",
    "untouched_buffers",
]

VOID = 255
"""The label of pixels without a class in most segmentation sets."""
LOOKS = 1024
"""So many labels of a first batch are tried, one after the other, as the one that a loss leaves out."""
BATCH_TEMPERATURE = 8.0
"""Default temperature for logits of shape ``(batch, classes)``. ResNet-20 on CIFAR-10 from trained weights: raising it
from 1 to 4 gave channel@0.613 9.6 points; 4 and 8 are equal within noise (``benchmarks/trained.py``)."""
DistillFn = Callable[[Any, Any], Tensor]


@dataclass(frozen=True)
class Classes:
    """Where a model's output holds class logits, and which of them count.

    Attributes:
        axis: The class axis: 1 as in ``F.cross_entropy``, or -1 for sequences.
        shift: Whether position ``t`` predicts the label at ``t+1`` (causal language models that shift by
            themselves).
        ignored: A label that the loss leaves out, although it may be a class; ``None`` for no such label. Labels out
            of range never count.
        size: How many classes there are; ``None`` if unknown.
    """

    axis: int
    shift: bool = False
    ignored: int | None = field(default=None, compare=False)
    size: int | None = field(default=None, compare=False)

    def positions(
        self, logits: Float[Tensor, "..."], target: Int[Tensor, "..."]
    ) -> tuple[Float[Tensor, "n classes"], Int[Tensor, " n"]]:
        """Logits and labels as a list of positions."""
        if self.shift:
            logits, target = logits[..., :-1, :], target[..., 1:]
        logits = logits.movedim(self.axis, -1)
        return logits.reshape(-1, logits.shape[-1]), target.reshape(-1)

    def counted(self, target: Int[Tensor, "..."]) -> Bool[Tensor, "..."]:
        """Which labels count: those in range that the loss does not leave out."""
        return counted(target, self.size, self.ignored)


def counted(labels: Int[Tensor, "..."], classes: int | None, ignored: int | None) -> Bool[Tensor, "..."]:
    """Which labels count.

    A label below 0 or beyond the last class can be no error: cross-entropy raises for it, unless it is told to leave
    such labels out.

    Args:
        labels: Integer labels.
        classes: How many classes there are; ``None`` if unknown.
        ignored: A label that the loss leaves out, although it may be a class.
    """
    labels = labels.long()  # in 8 bits, -100 would be 156
    counts = labels >= 0
    if classes is not None:
        counts = counts & (labels < classes)
    return counts if ignored is None else counts & (labels != ignored)


def find_classes(
    output: Any, target: Any, loss: Float[Tensor, ""] | None, loss_fn: LossFn | None = None
) -> Classes | None:
    """Find where an output holds class logits, from shapes and from what the loss computed.

    The target must hold integer labels with the logits' shape but for the class axis. Where several readings fit
    (sequences), the one whose cross-entropy is the loss is taken.

    Labels below 0 are ignored ones. One value beyond the last class is as well if it is the ``ignore_index`` of
    ``loss_fn``, or 255, or if the loss is the cross-entropy of all others. A class that is ignored is read from
    ``ignore_index``, or seen from the loss.

    Args:
        output: Of the model; see :func:`~cocktailsdk.training.step.forward.output_tensor`.
        target: Of the batch.
        loss: What the user's loss, or the model's, made of both; ``None`` if unknown.
        loss_fn: The user's loss, if there is one.

    Returns:
        The reading, or ``None`` where there is none: not a classification, or not to be told from outside.
    """
    logits = output_tensor(output)
    if logits is None or not logits.is_floating_point() or logits.ndim < 2 or not isinstance(target, Tensor):
        return None
    if target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
        return None
    ignored = ignored_by(loss_fn)
    fits: dict[Classes, list[int]] = {}  # with the labels beyond the last class
    for classes in (Classes(1), Classes(-1), Classes(-1, shift=True)):
        if classes.axis == -1 and logits.ndim == 2:
            continue  # the same as axis 1
        shape = list(logits.shape)
        size = shape.pop(classes.axis)
        if shape == list(target.shape):
            beyond = target.long()[target.long() >= size].unique().tolist()
            if len(beyond) <= 1:  # one such value may be what the loss leaves out
                fits[replace(classes, ignored=ignored, size=size)] = beyond
    sure = len(fits) == 1 and next(iter(fits.values())) in ([], [ignored], [VOID])
    best = next(iter(fits)) if sure else _closest([*fits], logits, target, loss)
    if best is None or loss is None or (ignored is not None and 0 <= ignored < (best.size or 0)):
        return best
    # a wrapper may leave out a class, whatever the index of the loss that it wraps
    seen = _ignored_by_value(best, logits, target, float(loss.detach()))
    return best if seen is None else replace(best, ignored=seen)


def _closest(
    fits: list[Classes], logits: Float[Tensor, "..."], target: Int[Tensor, "..."], loss: Float[Tensor, ""] | None
) -> Classes | None:
    """The reading whose cross-entropy is the loss.

    The closest, not the first that is close: with untrained weights all readings are.
    """
    if loss is None or not fits:
        return None
    wanted = float(loss.detach())
    off = {classes: abs(_cross_entropy(logits, target, classes) - wanted) for classes in fits}
    best = min(fits, key=off.__getitem__)
    if not off[best] <= 1e-5 * abs(wanted) + 1e-7:  # also where all labels are ignored, and nothing is known
        seen = [replace(c, ignored=v) for c in fits if (v := _ignored_by_value(c, logits, target, wanted)) is not None]
        if len(seen) == 1:
            return seen[0]
    return best if off[best] <= 1e-2 * abs(wanted) + 1e-4 else None


@torch.no_grad()
def _cross_entropy(logits: Float[Tensor, "..."], target: Int[Tensor, "..."], classes: Classes) -> float:
    rows, labels = classes.positions(logits.detach().float(), target)
    counts = classes.counted(labels)
    return float(F.cross_entropy(rows[counts], labels[counts]))


def ignored_by(loss_fn: Any) -> int | None:
    """The ``ignore_index`` of a loss function: an attribute, an argument that is bound, or a default value.

    ``functools.partial``, bound methods and modules that hold the loss are followed.

    Returns:
        ``None`` where it cannot be read, as in a ``lambda``, or parts of the loss differ.
    """
    if isinstance(loss_fn, functools.partial):
        bound: Any = loss_fn.keywords.get("ignore_index")
        return bound if _is_label(bound) else ignored_by(loss_fn.func)
    own: Any = getattr(loss_fn, "ignore_index", None)
    if _is_label(own):
        return int(own)
    if isinstance(loss_fn, nn.Module):
        parts: list[Any] = [getattr(module, "ignore_index", None) for module in loss_fn.modules()]
        found = {int(value) for value in parts if _is_label(value)}
        return found.pop() if len(found) == 1 else None
    if inspect.ismethod(loss_fn):
        return ignored_by(loss_fn.__self__)
    try:
        parameter = inspect.signature(loss_fn).parameters.get("ignore_index")
    except (TypeError, ValueError):
        return None
    return parameter.default if parameter is not None and _is_label(parameter.default) else None


def _is_label(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@torch.no_grad()
def _ignored_by_value(
    classes: Classes, logits: Float[Tensor, "..."], target: Int[Tensor, "..."], loss: float
) -> int | None:
    """The class that a mean cross-entropy leaves out, seen from its value.

    Args:
        classes: How both are read.
        logits: Of a batch.
        target: Its labels; those out of range do not count anyway.
        loss: What the loss function made of both.

    Returns:
        ``None`` where the loss is the mean over all labels in range, or is none of these means (class weights, label
        smoothing).
    """
    rows, labels = classes.positions(logits.float(), target)
    counts = counted(labels, rows.shape[-1], None)
    if not bool(counts.any()) or loss - loss != 0:
        return None
    labels = labels[counts].long()
    each = F.cross_entropy(rows[counts].double(), labels, reduction="none")

    def close(value: Tensor) -> bool:
        return abs(float(value) - loss) <= 1e-5 * abs(loss) + 1e-7

    if close(each.mean()):
        return None
    present = labels.unique()
    if len(present) > LOOKS:
        return None
    fits = [int(v) for v in present if bool((labels != v).any()) and close(each[labels != v].mean())]
    return fits[0] if len(fits) == 1 else None


def soft_cross_entropy(
    student: Float[Tensor, "..."],
    teacher: Float[Tensor, "..."],
    target: Int[Tensor, "..."],
    classes: Classes,
    temperature: float = 1.0,
) -> Float[Tensor, ""]:
    """Mean cross-entropy of the student against the teacher's probabilities; at another temperature T than 1, T² KL.

    T² keeps the size of gradients (Hinton et al., 2015, section 2.1). At T = 1 both losses have the same gradients.

    Args:
        student: Logits.
        teacher: Logits of the same shape.
        target: Labels; positions whose label is ignored, or out of range, do not count.
        classes: Where the classes are.
        temperature: What logits are divided by.
    """
    s, labels = classes.positions(student, target)
    t, _ = classes.positions(teacher, target)
    wide = torch.promote_types(s.dtype, torch.float32)  # float64 stays float64
    s, t = s.to(wide), t.to(wide)
    if temperature == 1:
        each = F.cross_entropy(s, t.softmax(-1), reduction="none")
    else:
        student_log, teacher_log = (s / temperature).log_softmax(-1), (t / temperature).log_softmax(-1)
        each = temperature**2 * F.kl_div(student_log, teacher_log, reduction="none", log_target=True).sum(-1)
    counts = counted(labels, s.shape[-1], classes.ignored)
    # not a product: what is no number at an ignored position must not count either
    return torch.where(counts, each, 0.0).sum() / counts.to(each.dtype).sum().clamp(min=1)


@dataclass(frozen=True)
class Distillation:
    """What a sparse network learns: from the labels, and from the dense one.

    Attributes:
        weight: Share of what the dense network says; at 0 there is no teacher.
        fn: ``fn(student_output, teacher_output)``, or ``None`` for soft cross-entropy.
        classes: Where the output holds class logits, if it does.
        temperature: Of the soft targets; ``None`` chooses by the logits' shape: :data:`BATCH_TEMPERATURE` for
            ``(batch, classes)``, otherwise 1.
    """

    weight: float
    fn: DistillFn | None = None
    classes: Classes | None = None
    temperature: float | None = 1.0

    def __call__(
        self, loss: Float[Tensor, ""], output: Any, teacher: Any, target: Any, loss_fn: LossFn | None = None
    ) -> Float[Tensor, ""]:
        """The loss of a sparse pass.

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
        from_labels = (1 - self.weight) * loss
        student, dense = output_tensor(output), output_tensor(teacher)
        if self.fn is not None:
            soft = loss_of(output, teacher, self.fn, "distill_fn")
        elif self.classes is None or student is None or dense is None:
            raise no_soft_loss(loss_fn, output)
        else:
            temperature = self.temperature or (BATCH_TEMPERATURE if student.ndim == 2 else 1.0)
            soft = soft_cross_entropy(student, dense, target, self.classes, temperature)
        return from_labels + self.weight * soft


def no_soft_loss(loss_fn: Any, output: Any) -> TrainingError:
    """The error for a loss that cannot take a teacher's output as its target."""
    loss = "the model's own loss" if loss_fn is None else getattr(loss_fn, "__name__", type(loss_fn).__name__)
    return TrainingError(
        f"{loss} on an output of type {type(output).__name__} is no classification of integer labels, so the teacher's "
        "output cannot be its target: give distillation=DistillationSettings(loss_fn=...), a function "
        "loss_fn(student_output, teacher_output) -> scalar, or DistillationSettings(weight=0) for no distillation"
    )


def check_teacher(student: Any, teacher: Any, fn: DistillFn | None) -> None:
    """See that a frozen teacher's output, which is one in evaluation mode, can teach a model in train mode.

    Args:
        student: The model's output for a batch in train mode.
        teacher: Its output for the same batch in evaluation mode.
        fn: The user's loss; ``None`` for the default one.

    Raises:
        TrainingError: It cannot; says what to do.
    """
    hint = (
        "give batches=BatchSettings(forward_fn=...), whose output has the same form in both modes, or let the dense "
        'network as it trains teach, recipe=dataclasses.replace(recipe_named("pretrained"), teacher="dense")'
    )
    if fn is not None:
        with (
            torch.no_grad(),
            blamed(
                "the distillation's loss_fn(student_output, teacher_output)",
                lambda: (
                    f"for a student's output that is {form_of(student)} (train mode) and a teacher's that is "
                    f"{form_of(teacher)} (evaluation mode)"
                ),
                f"let it take these, or {hint}",
            ),
        ):
            loss_of(student, teacher, fn, "distill_fn")
        return
    learns, teaches = output_tensor(student), output_tensor(teacher)
    found = None
    if learns is None:
        return
    if teaches is None or teaches.shape != learns.shape:
        found = f"{form_of(teacher)}, in train mode {form_of(student)}"
    elif _probabilities(teaches) and not _probabilities(learns):
        found = "probabilities, in train mode logits"
    if found is not None:
        raise TrainingError(f"the teacher is the model in evaluation mode, where its output is {found}: {hint}")


def _probabilities(output: Float[Tensor, "..."]) -> bool:
    """Whether each example's outputs are at least 0 and add up to 1, over the class axis."""
    sums = [output.sum(axis) for axis in (1, -1) if output.ndim > 1]
    return bool((output >= 0).all()) and any(bool((total - 1).abs().max() < 1e-2) for total in sums if total.numel())


@contextmanager
def untouched_buffers(model: nn.Module) -> Iterator[None]:
    """Let a forward pass in train mode leave no trace in the model's buffers (batch-norm statistics above all)."""
    before = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for module, name, buffer, value in before:
                buffer.copy_(value)  # in place: others hold this tensor
                module._buffers[name] = buffer  # a forward pass may have put another tensor there
