"""Transposable N:M sparsity: a weight and its transpose are both N:M."""

from __future__ import annotations

import itertools
import re
from typing import Any, Self

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from ..graph import Weight
from ..masks import Mask
from ..masks.tiles import covered_by_tiles, tiles, untiles
from .base import UMG, Subnet
from .checking import weight_masks
from .nm import NM, check_runs
from .registry import register_pattern

__all__ = ["Transposable", "best_squares"]

_AT_ONCE = 1 << 23  # elements of the largest temporary


@register_pattern("transposable")
class Transposable(NM):
    """Of every M x M tile N weights stay in each row and in each column (Hubara et al., 2021).

    So the backward pass, which multiplies with the transpose, is N:M as well.

    The choice is the best there is: of all such masks the one that keeps the largest sum of magnitudes in every tile.
    Tiles hold M consecutive outputs by M consecutive inputs, at one kernel position of one convolution group. What
    fills no tile is not pruned and counts as not covered; the exact sparsity is that of the weights covered.

    Args:
        n: Weights kept of each row and column.
        m: Side of a tile.
        pairs: Several (n, m) instead of one; by default 1:2, 2:4 and 4:8, all 50 % sparse.

    Raises:
        PatternError: Not 0 < n < m, or a pair twice.
    """

    def subnets(self) -> tuple[Subnet, ...]:
        """One for each pair, named like ``"transposable2:4"``."""
        return tuple(
            Subnet(f"{self.name}{n}:{m}", self.name, 1.0 - n / m, {"n": n, "m": m, "square": True})
            for n, m in self.pairs
        )

    def mask(self, subnet: Subnet, umg: UMG) -> Mask:
        """The best mask of each tile, from the weights as they are."""
        n, m = subnet.options["n"], subnet.options["m"]
        out: dict[str, Tensor] = {}
        for w in umg.eligible:
            parts = tiles(w, umg.ranked[w.name].detach(), m, m)
            out[w.name] = untiles(w, best_squares(parts, n).cpu(), True)
        return Mask(out)

    def check(self, subnet: Subnet, mask: Mask, umg: UMG) -> None:
        """Every row and column of every tile keeps exactly N weights, and what fills no tile is not pruned.

        Raises:
            PatternError: It is not so.
        """
        n, m = subnet.options["n"], subnet.options["m"]
        for weight, keep, hidden in weight_masks(subnet, mask, umg):
            parts = [None if t is None else tiles(weight, t, m, m) for t in (keep, hidden)]
            check_runs(subnet, weight, (keep, hidden), parts, covered_by_tiles(weight, m, m), n)

    def _covered(self, weight: Weight, m: int) -> int:
        """How many elements of a weight lie in full tiles of M x M."""
        return covered_by_tiles(weight, m, m)

    @classmethod
    def parse(cls, spec: str) -> Self | None:
        """``"transposable"`` is the default three; ``"transposable2:4"`` is one."""
        found = re.fullmatch(r"transposable(?:\s*(\d+)\s*:\s*(\d+))?", spec)
        if not found:
            return None
        arguments: dict[str, Any] = {"n": int(found[1]), "m": int(found[2])} if found[1] else {}
        return cls(**arguments)


def best_squares(values: Float[Tensor, "tiles m m"], n: int) -> Bool[Tensor, "tiles m m"]:
    """For each square the mask with N in every row and column that keeps the largest sum of magnitudes.

    Exact: an assignment is the best when no cycle of exchanges gains. In an exchange a row hands one of its columns to
    another row that lacks it; around a cycle of rows every row and column keeps its count. After a first sweep over
    pairs of rows the shortest cycles that gain are taken, in all squares at once, until there are none.
    """
    m = values.shape[-1]
    if values.device.type == "mps":  # has no float64
        values = values.cpu()
    step = torch.arange(m, device=values.device)
    start = (step[None, :] - step[:, None]) % m < n
    out = start.repeat(values.shape[0], 1, 1)
    at_once = max(1, _AT_ONCE // m**3)
    for begin in range(0, values.shape[0], at_once):
        weights = values[begin : begin + at_once].abs().to(torch.float64)
        keep = out[begin : begin + at_once]
        _share_out(weights, keep)
        unfinished = torch.arange(weights.shape[0], device=values.device)
        while unfinished.numel():
            improved, better = _improved(weights[unfinished], keep[unfinished])
            unfinished = unfinished[better]
            keep[unfinished] = improved[better]
    return out


def _share_out(weights: Float[Tensor, "tiles m m"], keep: Bool[Tensor, "tiles m m"]) -> None:
    """Let each pair of rows share out, in place and at its best, the columns that one of them alone keeps."""
    for i, k in itertools.combinations(range(keep.shape[-1]), 2):
        either = keep[:, i] ^ keep[:, k]  # one row keeps the column, the other does not
        # Every row keeps N columns, so each of the two keeps half of these. Row i gets the half with the largest gain.
        # -inf sorts all other columns behind; a stable sort breaks ties by position, the same on every device.
        gain = (weights[:, i] - weights[:, k]).masked_fill(~either, -torch.inf)
        order = gain.argsort(dim=-1, descending=True, stable=True)
        place = torch.arange(keep.shape[-1], device=keep.device).expand_as(order)
        rank = torch.empty_like(order).scatter_(-1, order, place)
        first = either & (rank < either.sum(-1, keepdim=True) // 2)
        keep[:, i] = keep[:, i] & ~either | first
        keep[:, k] = keep[:, k] & ~either | either & ~first


def _improved(
    weights: Float[Tensor, "tiles m m"], keep: Bool[Tensor, "tiles m m"]
) -> tuple[Bool[Tensor, "tiles m m"], Bool[Tensor, " tiles"]]:
    """Masks after one cycle of exchanges each, and which of them one has made better."""
    m = keep.shape[-1]
    # What it costs that row i hands a column to row k, and the cheapest column for that.
    handed = (weights[:, :, None] - weights[:, None]).masked_fill(~keep[:, :, None] | keep[:, None], torch.inf)
    cost, column = handed.min(-1)
    gains = -1e-12 * weights.amax((1, 2))  # less is rounding
    keep, better = keep.clone(), torch.zeros(keep.shape[0], dtype=torch.bool, device=keep.device)
    rest = torch.arange(keep.shape[0], device=keep.device)
    walk, through = cost, list[Tensor]()  # the cheapest walks of so many steps from row i to row k
    for _ in range(2, m + 1):
        walk, via = (walk[:, :, :, None] + cost[rest][:, None]).min(2)
        through.append(via)
        closed, row = walk.diagonal(dim1=1, dim2=2).min(-1)
        found = closed < gains[rest]
        if bool(found.any()):
            _exchange(keep, column, rest[found], row[found], [v[found] for v in through])
            better[rest[found]] = True
            rest, walk, through = rest[~found], walk[~found], [v[~found] for v in through]
        if not rest.numel():
            break
    return keep, better


def _exchange(
    keep: Bool[Tensor, "tiles m m"],
    column: Int64[Tensor, "tiles m m"],
    at: Int64[Tensor, " found"],
    row: Int64[Tensor, " found"],
    through: list[Tensor],
) -> None:
    """Make the exchanges of a cycle, in place, from its end back to the row where it began.

    The shortest cycle that gains passes each row once, since a part of it would gain otherwise.
    """
    each = torch.arange(at.numel(), device=at.device)
    to = row
    for via in reversed(through):
        giver = via[each, row, to]
        _hand(keep, at, giver, to, column)
        to = giver
    _hand(keep, at, row, to, column)


def _hand(keep: Tensor, at: Tensor, giver: Tensor, to: Tensor, column: Tensor) -> None:
    j = column[at, giver, to]
    keep[at, giver, j] = False
    keep[at, to, j] = True
