"""Weights as matrices of outputs by input features, as a matrix product with lowered inputs reads them."""

from __future__ import annotations

from math import prod

from jaxtyping import Shaped
from torch import Tensor

from ...graph import Weight
from ...masks.tiles import matrices, unmatrices

__all__ = ["as_matrices", "from_matrices", "parts_of"]


def _other_axes(weight: Weight) -> int:
    """How many positions the axes beside outputs and inputs have: of a kernel, or of stacked weights."""
    return prod(n for d, n in enumerate(weight.shape) if d not in (weight.out_axis, weight.in_axis))


def parts_of(weight: Weight) -> int:
    """How many matrices with inputs of their own a weight holds: convolution groups, or stacked weights (experts)."""
    return weight.groups if weight.op in ("conv", "conv_transpose") else _other_axes(weight)


def as_matrices(weight: Weight, tensor: Shaped[Tensor, "..."]) -> Shaped[Tensor, "parts rows features"]:
    """A tensor of the weight's shape as matrices of outputs by input features; a view or a copy.

    An input feature of a convolution is an input channel at a kernel position; features are ordered by kernel position,
    then by channel. A transposed convolution multiplies one input by its whole kernel: there, an output row is an
    output channel at a kernel position.

    Args:
        weight: The weight.
        tensor: Of its shape: its values, a mask, scores.
    """
    t = matrices(weight, tensor)  # one for each group (or stacked weight) and kernel position
    if weight.op not in ("conv", "conv_transpose"):
        return t
    t = t.unflatten(0, (weight.groups, _other_axes(weight)))
    if weight.op == "conv":
        return t.transpose(1, 2).flatten(2)
    return t.flatten(1, 2)


def from_matrices(weight: Weight, parts: Shaped[Tensor, "parts rows features"]) -> Shaped[Tensor, "..."]:
    """The inverse of :func:`as_matrices`."""
    if weight.op == "conv":
        t = parts.unflatten(2, (_other_axes(weight), -1)).transpose(1, 2)
    elif weight.op == "conv_transpose":
        t = parts.unflatten(1, (_other_axes(weight), -1))
    else:
        return unmatrices(weight, parts)
    return unmatrices(weight, t.flatten(0, 1))
