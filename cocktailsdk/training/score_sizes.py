"""Whether a metric gave as many scores as a batch has examples, tokens or pixels."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..errors import TrainingError
from ..utils.nested import tensors_in
from .step.forward import output_tensor

__all__ = ["check_size"]


def check_size(scores: Tensor, output: Any, target: Any) -> None:
    """Refuse scores that are neither one number for the batch nor one for each example, token or pixel.

    Metrics may leave out labels, ignored ones above all. Where the target has labels for tokens or pixels, all sizes
    are taken that a choice of labels is likely to have; where it has one for each example, only those without the
    negative labels, or of hits without one class.

    Raises:
        TrainingError: Says how many scores there are and how many were expected.
    """
    if not scores.ndim or _is_plausible(scores, output, target):
        return
    examples = _lengths(output, target)
    found = f"{scores.numel()} score{'s' * (scores.numel() != 1)} (shape {tuple(scores.shape)})"
    raise TrainingError(
        f"metric(output, target) returned {found} for a batch of {examples[0]} examples: return one number for each "
        "example (or token, or pixel), whose mean is taken, or a scalar for the whole batch"
    )


def _is_plausible(scores: Tensor, output: Any, target: Any) -> bool:
    lengths = _lengths(output, target)
    if not lengths or len(scores) in lengths:
        return True
    leaves = tensors_in(target) or [t for t in (output_tensor(output),) if t is not None]
    if scores.numel() in {leaf.numel() for leaf in leaves}:
        return True
    return isinstance(target, Tensor) and _is_choice(scores, target)


def _lengths(output: Any, target: Any) -> list[int]:
    """What may be the number of examples."""
    leaves = [t for t in tensors_in(target) if t.ndim]
    if isinstance(target, Tensor) and target.ndim:
        return [len(target)]
    logits = output_tensor(output)
    own = [len(logits)] if logits is not None and logits.ndim else []
    return [*([len(target)] if isinstance(target, tuple | list) else []), *map(len, leaves), *own]


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
