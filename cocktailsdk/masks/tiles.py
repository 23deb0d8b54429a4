"""Weights as matrices of outputs by inputs, cut into tiles (blocks) or into runs along the inputs (N:M)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..graph import Weight

__all__ = [
    "covered_by_runs",
    "covered_by_tiles",
    "matrices",
    "runs",
    "split_inputs",
    "tiles",
    "unmatrices",
    "unruns",
    "untiles",
]


def matrices(weight: Weight, tensor: Tensor) -> Tensor:
    """A tensor of the weight's shape as matrices of outputs by inputs.

    There is one for each convolution group and kernel position (and for each of stacked weights, an expert's, say), as
    the matrix product of a channels-last convolution reads them.

    Returns:
        ``(matrices, outputs, inputs)``; a view or a copy.
    """
    t = tensor.movedim((weight.out_axis, weight.in_axis), (-2, -1))
    if weight.groups > 1:
        axis = _grouped(weight)
        t = t.unflatten(axis, (weight.groups, -1)).movedim(axis - 1, 0)
    return t.reshape(-1, *t.shape[-2:])


def unmatrices(weight: Weight, parts: Tensor) -> Tensor:
    """The inverse of :func:`matrices`."""
    others = [n for d, n in enumerate(weight.shape) if d not in (weight.out_axis, weight.in_axis)]
    if weight.groups > 1:
        axis = _grouped(weight)
        t = parts.reshape(weight.groups, *others, *parts.shape[-2:]).movedim(0, axis - 1)
        t = t.flatten(axis - 1, axis)
    else:
        t = parts.reshape(*others, *parts.shape[-2:])
    return t.movedim((-2, -1), (weight.out_axis, weight.in_axis)).contiguous()


def _grouped(weight: Weight) -> int:
    """Which of the last two axes, outputs or inputs, holds the convolution groups one after another."""
    return -1 if weight.op == "conv_transpose" else -2


def tiles(weight: Weight, tensor: Tensor, rows: int, columns: int) -> Tensor:
    """A tensor of the weight's shape as tiles of its matrices; what fills no tile, at their ends, is left out.

    Returns:
        ``(tiles, rows, columns)``; the order of the tiles is fixed by the weight alone.
    """
    t = matrices(weight, tensor)
    high, wide = t.shape[1] // rows, t.shape[2] // columns
    t = t[:, : high * rows, : wide * columns].reshape(t.shape[0], high, rows, wide, columns)
    return t.transpose(2, 3).reshape(-1, rows, columns)


def untiles(weight: Weight, parts: Tensor, fill: bool | float) -> Tensor:
    """The inverse of :func:`tiles`; what fills no tile takes the value ``fill``."""
    shape = matrices(weight, torch.empty(weight.shape, device="meta")).shape
    rows, columns = parts.shape[-2:]
    high, wide = shape[1] // rows, shape[2] // columns
    out = parts.new_full(shape, fill)
    out[:, : high * rows, : wide * columns] = (
        parts.reshape(shape[0], high, wide, rows, columns)
        .transpose(2, 3)
        .reshape(shape[0], high * rows, wide * columns)
    )
    return unmatrices(weight, out)


def covered_by_tiles(weight: Weight, rows: int, columns: int) -> int:
    """How many of the weight's elements lie in full tiles."""
    n, high, wide = matrices(weight, torch.empty(weight.shape, device="meta")).shape
    return int(n) * (int(high) // rows * rows) * (int(wide) // columns * columns)


def runs(weight: Weight, tensor: Tensor, m: int) -> Tensor:
    """A tensor of the weight's shape as runs of M consecutive input channels, remainders left out.

    Returns:
        ``(..., n_runs, m)``; a view or a copy. The order of the runs is fixed by the weight alone.
    """
    t = _inputs_last(weight, tensor)
    n = t.shape[-1] // m
    return t[..., : n * m].reshape(*t.shape[:-1], n, m)


def unruns(weight: Weight, parts: Tensor, fill: bool | float) -> Tensor:
    """The inverse of :func:`runs`; remainders take the value ``fill``."""
    shape = _inputs_last(weight, torch.empty(weight.shape, device="meta")).shape
    n = parts.shape[-2] * parts.shape[-1]
    out = parts.new_full(shape, fill)
    out[..., :n] = parts.reshape(*shape[:-1], n)
    if split_inputs(weight):
        return out.movedim(-1, 1).reshape(weight.groups * shape[-1], *weight.shape[1:]).contiguous()
    return out.movedim(-1, weight.in_axis).contiguous()


def covered_by_runs(weight: Weight, m: int) -> int:
    """How many of the weight's elements lie in full runs of M."""
    length = weight.shape[weight.in_axis] // (weight.groups if split_inputs(weight) else 1)
    return weight.numel // length * (length // m * m) if length else 0


def split_inputs(weight: Weight) -> bool:
    """Whether the input axis holds the inputs of one group after another, as in a grouped transposed convolution.

    A run must not cross from one group to the next.
    """
    return weight.op == "conv_transpose" and weight.groups > 1 and weight.in_axis == 0


def _inputs_last(weight: Weight, tensor: Tensor) -> Tensor:
    if split_inputs(weight):
        return tensor.reshape(weight.groups, -1, *tensor.shape[1:]).movedim(1, -1)
    return tensor.movedim(weight.in_axis, -1)
