"""Held-out metrics, counted exactly.

A metric is a function ``metric(output, target)`` that returns *scores*: one number for every example (or token, or
pixel) in a tensor of any shape. A network's metric is the mean of all scores over all batches. Boolean scores
are counted as integers, and their mean is known to be at most 1, of which merging makes use.

A mean that is not finite is recorded as NaN, and no search takes a network for its sake.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import torch
from jaxtyping import Bool, Shaped
from torch import Tensor, nn

from ..errors import TrainingError
from ..utils.losses import ForwardFn, LossFn, loss_of
from ..utils.modes import evaluating
from ..utils.nested import tensors_in
from .distributed.ranks import SINGLE, Ranks
from .distributed.sharing import part_of
from .step.distill import Classes, counted
from .step.forward import output_tensor

__all__ = [
    "HeldOutLoss",
    "MetricFn",
    "NothingScored",
    "Score",
    "accuracy",
    "accuracy_of",
    "counts_hits",
    "hits_of",
    "mean_score",
]

MetricFn = Callable[[Any, Any], Tensor]


class NothingScored(TrainingError):
    """Held-out batches gave no scores: there were none, or all labels are ignored."""


def accuracy(
    output: Any, target: Shaped[Tensor, "batch ..."], ignored: int | None = None
) -> Bool[Tensor, "batch ..."] | Bool[Tensor, " labels"]:
    """Whether the largest logit (along axis 1) is the target's.

    Args:
        output: Logits, or an output that holds them.
        target: Labels. Those below 0 or beyond the last class do not count.
        ignored: A class that does not count either.

    Returns:
        In the target's shape; in one dimension where some labels do not count.
    """
    hits, counts = hits_of(output, target, ignored)
    return hits if bool(counts.all()) else hits[counts]


def hits_of(output: Any, target: Tensor, ignored: int | None = None) -> tuple[Tensor, Tensor]:
    """Where the largest logit is the target's, and which labels count; both in the target's shape."""
    logits = output_tensor(output)
    if logits is None:
        raise TrainingError(f"accuracy needs logits, found {type(output).__name__}: give metric(output, target)")
    if not isinstance(target, Tensor):
        raise TrainingError(f"accuracy needs labels, found {type(target).__name__}: give metric(output, target)")
    return logits.argmax(1) == target, counted(target, logits.shape[1], ignored)


def accuracy_of(classes: Classes) -> MetricFn:
    """:func:`accuracy` without the label that the loss leaves out."""
    ignores = classes.ignored is not None and 0 <= classes.ignored < (classes.size or 0)
    return functools.partial(accuracy, ignored=classes.ignored) if ignores else accuracy


def counts_hits(metric: MetricFn) -> bool:
    """Whether a metric is :func:`accuracy`."""
    return (metric.func if isinstance(metric, functools.partial) else metric) is accuracy


@dataclass(frozen=True)
class HeldOutLoss:
    """The loss as a metric: a batch's mean for each of its labels that count, or once where there are no labels.

    Attributes:
        loss_fn: The user's, or ``None`` for the model's own.
        sign: -1 where more is to be better.
        classes: Where the output holds class logits, if it does.
    """

    loss_fn: LossFn | None
    sign: int
    classes: Classes | None = None

    def __call__(self, output: Any, target: Any) -> Tensor:
        """The scores of a batch."""
        loss = self.sign * loss_of(output, target, self.loss_fn)
        if self.classes is None:
            return loss
        labels = target[..., 1:] if self.classes.shift else target
        return loss.expand(int(self.classes.counted(labels).sum()))


@dataclass(frozen=True)
class Score:
    """A network's metric, exact.

    Attributes:
        value: The mean of its scores; what is not finite has the worst value that there is.
        maximum: What no network can exceed, where known.
        count: How many scores it is the mean of.
    """

    value: Fraction
    maximum: Fraction | None = None
    count: int = 0

    @property
    def number(self) -> float:
        """The mean as a number; NaN where it is not finite."""
        return readable(self.value)

    def negated(self) -> Score:
        """Of a metric of which less is better: so that more is. What is not finite stays the worst."""
        value = self.value if math.isnan(self.number) else -self.value
        return replace(self, value=value, maximum=None if self.maximum is None else Fraction(0))


NOT_FINITE = Fraction(-1.7976931348623157e308)


def readable(value: Fraction) -> float:
    """A score, or a mean of some, as a number; NaN where one of them was not finite."""
    # a share of what is not finite is still far below any number that a metric has
    return math.nan if value < NOT_FINITE / 10**60 else float(value)


@torch.no_grad()
def mean_score(
    model: nn.Module,
    batches: Iterable[Any],
    forward: ForwardFn,
    metric: MetricFn,
    ranks: Ranks = SINGLE,
    *,
    check: bool = False,
) -> Score:
    """Mean score of a model over batches, as it stands and in evaluation mode.

    Several processes each run their part of every batch; sums and counts are added up, so that every example counts
    once.

    Args:
        model: The network; its mode is put back afterwards.
        batches: On the model's device.
        forward: How a batch is used.
        metric: See the module's text.
        ranks: The processes.
        check: Whether to refuse a number of scores that does not fit the first batch.

    Raises:
        TrainingError: Without any batch or score, or where the metric returns no tensor, or with ``check`` neither one
            number nor as many as there are examples (or labels).
    """
    total: Tensor | None = None
    count, boolean = 0, False
    with evaluating(model):
        for whole in batches:
            part = None if ranks.world == 1 else part_of(whole, ranks)
            output, target = forward(model, whole if part is None else part.batch)
            scores = metric(output, target)
            if not isinstance(scores, Tensor):
                raise TrainingError(
                    f"metric(output, target) must return a tensor of scores, one for each example, got "
                    f"{type(scores).__name__}"
                )
            if check and total is None and not counts_hits(metric) and not isinstance(metric, HeldOutLoss):
                check_size(scores, output, target)
            boolean = scores.dtype == torch.bool
            counted = scores.numel()
            if part is not None and not scores.ndim:  # one number for the batch, which weighs as its examples do
                scores, counted = scores * (part.count / max(part.total, 1)), int(ranks.is_main)
            elif part is not None and not part.count:
                scores, counted = scores[:0], 0
            hits = scores.sum(dtype=torch.int64 if boolean or not scores.is_floating_point() else torch.float64)
            total = hits if total is None else total + hits
            count += counted
    if total is not None and ranks.world > 1:
        total, count = ranks.sum(total), int(ranks.sum(torch.tensor(count)))
    if total is None or not count:
        raise NothingScored(
            "there is nothing to evaluate on: the held-out loader gave no batches or no scores; is every label ignored?"
        )
    number = total.item()
    value = Fraction(number) / count if math.isfinite(number) else NOT_FINITE
    return Score(value, Fraction(1) if boolean else None, count)


def check_size(scores: Tensor, output: Any, target: Any) -> None:
    """Refuse scores that are neither one number for the batch nor one for each example, token or pixel.

    Metrics may leave out labels, ignored ones above all. Where the target has labels for tokens or pixels, all sizes
    are taken that a choice of labels is likely to have; where it has one for each example, only those without the
    negative labels, or of hits without one class.

    Raises:
        TrainingError: Says how many scores there are and how many were expected.
    """
    lengths = _lengths(output, target)
    if not scores.ndim or not lengths or len(scores) in lengths:
        return
    logits = output_tensor(output)
    leaves = tensors_in(target) or ([] if logits is None else [logits])
    if scores.numel() in {leaf.numel() for leaf in leaves}:
        return
    if isinstance(target, Tensor) and _is_choice(scores, target):
        return
    found = f"{scores.numel()} score{'s' * (scores.numel() != 1)} (shape {tuple(scores.shape)})"
    raise TrainingError(
        f"metric(output, target) returned {found} for a batch of {lengths[0]} examples: return one number for each "
        "example (or token, or pixel), whose mean is taken, or a scalar for the whole batch"
    )


def _lengths(output: Any, target: Any) -> list[int]:
    """What may be the number of examples."""
    if isinstance(target, Tensor) and target.ndim:
        return [len(target)]
    parts = [*tensors_in(target), output_tensor(output)]
    own = [len(target)] if isinstance(target, tuple | list) else []
    return own + [len(part) for part in parts if part is not None and part.ndim]


def _is_choice(scores: Tensor, target: Tensor) -> bool:
    """Whether scores are likely those of a choice of labels."""
    size, hits, each = scores.numel(), scores.dtype.is_floating_point is False, target.numel() == len(target)
    if scores.ndim > 1 or size > target.numel() or target.is_floating_point():
        return False
    if not each and (hits or 2 * size >= target.numel()):
        return True
    views = [target] if target.ndim < 2 else [target, target[..., 1:]]  # language models predict the next token
    for labels in views:
        kept = labels[labels >= 0]
        without_one = {kept.numel() - int(n) for n in kept.unique(return_counts=True)[1]} if hits or not each else set()
        if size in {labels.numel(), kept.numel(), *without_one}:
            return True
    return False
