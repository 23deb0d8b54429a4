"""How the mask of a weight is laid out for packing: as a cell for each element, each block or each run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, Self

import torch
from jaxtyping import Bool
from torch import Tensor

from ..errors import BundleError
from ..graph import Weight
from ..io.values import quoted
from .combinations import MAX_RUN
from .tiles import covered_by_runs, covered_by_tiles, runs, tiles, unruns, untiles

__all__ = ["MaskLayout"]


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
