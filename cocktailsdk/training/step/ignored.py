"""Labels that a loss leaves out (``ignore_index``): read from the loss function, or seen from what it computed."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["counted", "ignored_by", "ignored_by_value"]

LOOKS = 1024
"""So many labels of a first batch are tried, one after the other, as the one that a loss leaves out."""


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
def ignored_by_value(rows: Float[Tensor, "n classes"], labels: Int[Tensor, " n"], loss: float) -> int | None:
    """The class that a mean cross-entropy leaves out, seen from its value.

    Args:
        rows: Logits.
        labels: Of the rows; those out of range do not count anyway.
        loss: What the loss function made of both.

    Returns:
        ``None`` where the loss is the mean over all labels in range, or is none of these means (class weights, label
        smoothing).
    """
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
