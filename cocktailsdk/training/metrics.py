"""Held-out metrics, counted exactly.

A metric is a function ``metric(output, target)`` that returns *scores*: one number for every example (or token, or
pixel) in a tensor of any shape. A network's metric is the mean of all scores over all batches. Boolean scores
are counted as integers, and their mean is known to be at most 1, of which merging makes use.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from jaxtyping import Bool, Shaped
from torch import Tensor, nn

from ..errors import TrainingError
from .forward import ForwardFn, output_tensor
from .ranks import SINGLE, Ranks
from .sharing import part_of

__all__ = ["MetricFn", "Score", "accuracy", "mean_score"]

MetricFn = Callable[[Any, Any], Tensor]


def accuracy(output: Any, target: Shaped[Tensor, "batch ..."]) -> Bool[Tensor, "batch ..."]:
    """Whether the largest logit (along axis 1) is the target's.

    Args:
        output: Logits, or an output that holds them.
        target: Labels.
    """
    logits = output_tensor(output)
    if logits is None:
        raise TrainingError(f"accuracy needs logits, found {type(output).__name__}: give metric(output, target)")
    return logits.argmax(1) == target


@dataclass(frozen=True)
class Score:
    """A network's metric, exact.

    Attributes:
        value: The mean of its scores.
        maximum: What no network can exceed, where known.
        count: How many scores it is the mean of.
    """

    value: Fraction
    maximum: Fraction | None = None
    count: int = 0


_WORST = Fraction(-1.7976931348623157e308)


@torch.no_grad()
def mean_score(
    model: nn.Module, batches: Iterable[Any], forward: ForwardFn, metric: MetricFn, ranks: Ranks = SINGLE
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

    Raises:
        TrainingError: Without any batch or score, or where the metric returns no tensor.
    """
    total: Tensor | None = None
    count, boolean = 0, False
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        for whole in batches:
            part = None if ranks.world == 1 else part_of(whole, ranks)
            scores = metric(*forward(model, whole if part is None else part.batch))
            if not isinstance(scores, Tensor):
                raise TrainingError(
                    f"metric(output, target) must return a tensor of scores, one for each example, got "
                    f"{type(scores).__name__}"
                )
            boolean = scores.dtype == torch.bool
            counted = scores.numel()
            if part is not None and not scores.ndim:  # one number for the batch, which weighs as its examples do
                scores, counted = scores * (part.count / max(part.total, 1)), int(ranks.is_main)
            elif part is not None and not part.count:
                scores, counted = scores[:0], 0
            hits = scores.sum(dtype=torch.int64 if boolean or not scores.is_floating_point() else torch.float64)
            total = hits if total is None else total + hits
            count += counted
    finally:
        for module, mode in modes:
            module.training = mode
    if total is not None and ranks.world > 1:
        total, count = ranks.sum(total), int(ranks.sum(torch.tensor(count)))
    if total is None or not count:
        raise TrainingError("there is nothing to evaluate on: the held-out loader gave no batches or no scores")
    number = total.item()
    value = Fraction(number) / count if math.isfinite(number) else _WORST
    return Score(value, Fraction(1) if boolean else None, count)
