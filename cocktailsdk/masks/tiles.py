"""Weights as matrices of outputs by inputs, cut into tiles (blocks) or into runs along the inputs (N:M).

A weight's mask has a *cell* for each tile, run or element (:class:`MaskLayout`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Self

import torch
from jaxtyping import Bool
from torch import Tensor

from ..errors import BundleError
from ..graph import Weight
from ..io.values import quoted
from .bits import MAX_RUN


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


@dataclass(frozen=True)
class MaskLayout:
    """How a weight's mask becomes cells.

    Attributes:
        block: Outputs and inputs of blocks whose elements are all kept or all masked; a cell is a block.
        nm: N and M, where every run of M keeps exactly N; a cell is a run.
        square: Whether the runs are the rows of M x M tiles (transposable N:M), and not all runs of a weight.

    Without ``block`` and ``nm`` a cell is an element. Elements outside of blocks and runs are kept.
    """

    block: tuple[int, int] | None = None
    nm: tuple[int, int] | None = None
    square: bool = False

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Self:
        """The layout that a subnet's options, or an entry of encoded masks, describe.

        Raises:
            BundleError: Its numbers make no sense.
        """
        if "block" in options:
            block = options["block"]
            if (
                not isinstance(block, list | tuple)
                or len(block) != 2
                or any(type(n) is not int or n < 1 for n in block)
            ):
                raise BundleError(f"a mask has blocks of {quoted(block)}, not of two whole numbers")
            return cls(block=(block[0], block[1]))
        n, m = options.get("n"), options.get("m")
        if n is None and m is None:
            return cls()
        if type(n) is not int or type(m) is not int or not 0 < n < m <= MAX_RUN:
            raise BundleError(f"a mask keeps {quoted(n)} of {quoted(m)}, not N of M with 0 < N < M <= {MAX_RUN}")
        return cls(nm=(n, m), square=bool(options.get("square", False)))

    def entry(self) -> dict[str, Any]:
        """What :meth:`of` reads."""
        out: dict[str, Any] = {}
        if self.block is not None:
            out["block"] = list(self.block)
        if self.nm is not None:
            out |= {"n": self.nm[0], "m": self.nm[1], **({"square": True} if self.square else {})}
        return out

    def encode(self, weight: Weight, keep: Bool[Tensor, "..."]) -> Tensor:
        """The mask as cells: ``(cells,)``, or ``(runs, m)``."""
        if self.block is not None:
            return tiles(weight, keep, *self.block)[:, 0, 0]
        if self.nm is not None:
            m = self.nm[1]
            return (tiles(weight, keep, m, m) if self.square else runs(weight, keep, m)).reshape(-1, m)
        return keep.reshape(-1)

    def decode(self, weight: Weight, cells: Tensor) -> Bool[Tensor, "..."]:
        """The inverse of :meth:`encode`."""
        if self.block is not None:
            return untiles(weight, cells[:, None, None].expand(-1, *self.block), True)
        if self.nm is not None:
            m = self.nm[1]
            if self.square:
                return untiles(weight, cells.reshape(-1, m, m), True)
            shape = runs(weight, torch.empty(weight.shape, device="meta"), m).shape
            return unruns(weight, cells.reshape(shape), True)
        return cells.reshape(weight.shape)

    def cells(self, weight: Weight) -> int:
        """How many cells a weight has."""
        if self.block is not None:
            return covered_by_tiles(weight, *self.block) // prod(self.block)
        if self.nm is not None:
            m = self.nm[1]
            return (covered_by_tiles(weight, m, m) if self.square else covered_by_runs(weight, m)) // m
        return weight.numel


def smallest_layout(
    options: Mapping[str, Any], weights: Sequence[Weight], keeps: Sequence[Tensor]
) -> tuple[MaskLayout, Tensor]:
    """The smallest layout that holds the masks of weights exactly, and their cells.

    Args:
        options: Of the subnetwork, which may say what its blocks or runs are.
        weights: The weights.
        keeps: Their masks.
    """
    try:
        layout = MaskLayout.of(options)
    except (BundleError, TypeError):  # options of a user's pattern that mean something else, or runs too long
        layout = MaskLayout()
    if layout != MaskLayout() and all(w.op for w in weights):
        parts = [layout.encode(w, k) for w, k in zip(weights, keeps, strict=True)]
        cells = torch.cat(parts)
        if all(torch.equal(layout.decode(w, c), k) for w, c, k in zip(weights, parts, keeps, strict=True)) and (
            layout.nm is None or bool((cells.sum(-1) == layout.nm[0]).all())
        ):
            return layout, cells
    return MaskLayout(), torch.cat([k.reshape(-1) for k in keeps])
