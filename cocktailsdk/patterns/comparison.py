"""Dropping the elements of least score within each weight, or within each of its rows, to an exact total."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from ..errors import PatternError
from ..graph import Weight
from .magnitudes import nan_error
from .ranking import drop_smallest
from .scores.base import Comparison
from .scores.matrices import as_matrices, from_matrices

__all__ = ["apportion", "drop_least"]


def drop_least(
    weights: Sequence[Weight],
    scores: Mapping[str, Float[Tensor, "..."]],
    keep: Mapping[str, Bool[Tensor, "..."]],
    sparsity: float,
    comparison: Comparison,
) -> dict[str, Bool[Tensor, "..."]]:
    """Mask exactly ``round(sparsity * total)`` of all elements, those of least magnitude among what is compared.

    Where weights or rows are compared by themselves, each has ``sparsity`` of its elements masked, rounded so that the
    total is exact. What was masked before stays masked. Ties by position.

    Args:
        weights: The weights, in the order of execution.
        scores: By name, of the weights' shapes.
        keep: What is kept so far, by name; weights not in it are not masked yet.
        sparsity: In [0, 1].
        comparison: What competes with what.

    Returns:
        What is kept, by name.

    Raises:
        PatternError: A score is NaN.
    """
    total = sum(w.numel for w in weights)
    gone = sum(k.numel() - int(k.count_nonzero()) for k in keep.values())
    count = round(sparsity * total) - gone
    if comparison == "global":
        return drop_smallest({w.name: scores[w.name] for w in weights}, keep, count, kept=total - gone)
    masked = [_masked(w, keep.get(w.name), comparison) for w in weights]
    sizes = [torch.full_like(m, w.numel // max(1, m.numel())) for w, m in zip(weights, masked, strict=True)]
    more = apportion(torch.cat(sizes), torch.cat(masked), sparsity, count).split([m.numel() for m in masked])
    out: dict[str, Tensor] = {}
    for weight, counts in zip(weights, more, strict=True):
        before = {weight.name: keep[weight.name]} if weight.name in keep else {}
        if comparison == "layer":
            out |= drop_smallest({weight.name: scores[weight.name]}, before, int(counts))
        else:
            out[weight.name] = _drop_in_rows(weight, scores[weight.name], before.get(weight.name), counts)
    return out


def _masked(weight: Weight, keep: Bool[Tensor, "..."] | None, comparison: Comparison) -> Int64[Tensor, " pools"]:
    """How many elements of each pool are masked so far."""
    rows = (
        1 if comparison == "layer" else as_matrices(weight, torch.empty(weight.shape, device="meta")).shape[:2].numel()
    )
    if keep is None:
        return torch.zeros(rows, dtype=torch.int64)
    if comparison == "layer":
        return (~keep).sum().reshape(1).cpu()
    return (~as_matrices(weight, keep)).sum(-1).flatten().cpu()


def apportion(
    sizes: Int64[Tensor, " pools"], masked: Int64[Tensor, " pools"], sparsity: float, count: int
) -> Int64[Tensor, " pools"]:
    """How many more elements of each pool are masked: ``sparsity`` of each, rounded to an exact sum.

    Each pool gets the whole part of what it lacks. What is left over goes to the pools with the largest fractions, ties
    by position (the method of largest remainders).

    Args:
        sizes: Elements of each pool.
        masked: How many of them are masked so far.
        sparsity: The share of each that is to be masked in the end.
        count: The sum.
    """
    lacking = sizes.double() * sparsity - masked
    out = lacking.clamp(min=0).floor().long()
    left = count - int(out.sum())
    # rounding up in the levels before leaves some pools above their share, for which others are cut
    order = (lacking - out).argsort(descending=left > 0, stable=True)
    room = (sizes - masked - out > 0) if left > 0 else out > 0
    chosen = order[room[order]][: abs(left)]
    out[chosen] += 1 if left > 0 else -1
    if int(out.sum()) != count:  # more than one each: sparsity and count do not belong together
        raise PatternError(f"cannot mask {count} more elements at a sparsity of {sparsity}")
    return out


def _drop_in_rows(
    weight: Weight,
    scores: Float[Tensor, "..."],
    keep: Bool[Tensor, "..."] | None,
    counts: Int64[Tensor, " pools"],
) -> Bool[Tensor, "..."]:
    rows = as_matrices(weight, scores.detach()).abs()
    if bool(rows.isnan().any()):
        raise nan_error(weight.name, int(rows.isnan().sum()))
    kept = torch.ones_like(rows, dtype=torch.bool) if keep is None else as_matrices(weight, keep).to(rows.device)
    # what is masked already comes last, after what is infinite
    order = torch.where(kept, rows, torch.inf).flatten(0, 1).sort(dim=1, stable=True).indices
    goes = torch.arange(order.shape[1], device=rows.device) < counts.to(rows.device)[:, None]
    drops = torch.zeros_like(goes).scatter_(1, order, goes).view(rows.shape)
    return from_matrices(weight, kept & ~drops)
