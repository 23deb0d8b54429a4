"""Masked least squares: the weights that are left make up for those that are gone."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Bool, Float
from torch import Tensor

__all__ = ["ITERATIONS", "iterates", "masked_least_squares", "output_error"]

ITERATIONS = 30
TOLERANCE = 1e-3
"""Iterations end when every row's gradient is so much shorter than at the start."""


def masked_least_squares(
    weight: Float[Tensor, "parts rows n"],
    keep: Bool[Tensor, "parts rows n"],
    gram: Float[Tensor, "parts n n"],
    damping: float,
    iterations: int = ITERATIONS,
) -> Float[Tensor, "parts rows n"]:
    """The last of :func:`iterates`, or the masked weights if there is none."""
    found = weight * keep
    for x in iterates(weight, keep, gram, damping, iterations):
        found = x
    return found


def iterates(
    weight: Float[Tensor, "parts rows n"],
    keep: Bool[Tensor, "parts rows n"],
    gram: Float[Tensor, "parts n n"],
    damping: float,
    iterations: int = ITERATIONS,
) -> Iterator[Float[Tensor, "parts rows n"]]:
    """Minimise ``‖X W'ᵀ - X Wᵀ‖² + λ ‖W' - W‖²`` over the weights ``W'`` that are zero where the mask is.

    All rows are solved at once by conjugate gradients on their own support, preconditioned by the diagonal. Every
    iteration lowers the objective, so stopping early is safe. A row's support need not be that of others, for which a
    direct solution would take one factorization for each row.

    Args:
        weight: The dense weights ``W``.
        keep: The mask.
        gram: ``XᵀX``.
        damping: ``λ`` as a share of the mean of the gram matrix's diagonal.
        iterations: At most so many, each a product of the weight with the gram matrix.

    Yields:
        The weights after each iteration.
    """
    energy = gram.diagonal(dim1=-2, dim2=-1)
    extra = (damping * energy.mean(-1, keepdim=True)).clamp(min=torch.finfo(gram.dtype).tiny)  # parts, 1
    support = keep.to(weight.dtype)

    def applied(x: Tensor) -> Tensor:
        return (x @ gram + extra[:, None] * x) * support

    def dot(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).sum(-1, keepdim=True)

    inverse = 1.0 / (energy + extra)[:, None]
    x = weight * support
    residual = applied(weight - x)
    z = residual * inverse
    direction, size = z, dot(residual, z)
    stop = size * TOLERANCE**2
    for _ in range(iterations):
        if bool((size <= stop).all()):
            break
        step = applied(direction)
        length = dot(direction, step)
        rate = torch.where(length > 0, size / length.clamp(min=torch.finfo(length.dtype).tiny), 0.0)
        x = x + rate * direction
        yield x
        residual = residual - rate * step
        z = residual * inverse
        new = dot(residual, z)
        ratio = torch.where(size > 0, new / size.clamp(min=torch.finfo(size.dtype).tiny), 0.0)
        direction, size = z + ratio * direction, new


def output_error(
    weight: Float[Tensor, "parts rows n"], other: Float[Tensor, "parts rows n"], gram: Float[Tensor, "parts n n"]
) -> float:
    """``‖X W'ᵀ - X Wᵀ‖²`` over the inputs that a gram matrix was summed of."""
    difference = other - weight
    return float(((difference @ gram) * difference).sum())
