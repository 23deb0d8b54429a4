"""Block sparsity: whole blocks of R outputs by C inputs, ranked by their L1 norm."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Self

import torch
from jaxtyping import Bool, Float32
from torch import Tensor

from ..errors import PatternError
from ..graph import Weight
from ..masks import Mask
from ..masks.tiles import covered_by_tiles, tiles, untiles
from .base import UMG, Pattern, Subnet, checked_sparsities, level_of
from .checking import covered_share, refuse, weight_masks, zeros_among_covered
from .comparison import apportion
from .ranking import drop_smallest
from .registry import register_pattern
from .scores.base import Comparison


@register_pattern("block")
class Block(Pattern):
    """Blocks of R outputs by C inputs go as a whole, nested over the levels.

    The weights are seen as matrices of outputs by inputs, one for each kernel position and convolution group, so that a
    block holds consecutive output and consecutive input channels at one kernel position. What fills no block, at a
    matrix's last rows and columns, is not pruned and counts as not covered. Exactly ``round(sparsity * n)`` of the n
    blocks go, those of least L1 norm, ties by position.

    Args:
        size: R and C.
        sparsities: Ascending, in [0, 1]: the share of blocks that go; by default ``1 - (1 - rate)^k`` for k = 1 …
            rounds.
        rounds: Number of default levels.
        rate: Share of the kept blocks that each default level removes.
        scope: ``"global"``: blocks are ranked over all weights; ``"layer"``: the share goes from every weight.

    Raises:
        PatternError: An argument makes no sense.
    """

    term = "unstructured"

    def __init__(
        self,
        size: Sequence[int] = (4, 4),
        sparsities: Sequence[float] | None = None,
        rounds: int = 10,
        rate: float = 0.2,
        scope: str = "global",
    ) -> None:
        sides: tuple[Any, ...] = tuple(size) if isinstance(size, list | tuple) else (size,)
        if len(sides) != 2 or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in sides):
            raise PatternError(f"{self.name}: a block's size is two whole numbers, outputs and inputs, not {size!r}")
        if sides == (1, 1):
            raise PatternError(f"{self.name}: blocks of one weight are the pattern 'unstructured'")
        if scope not in ("global", "layer"):
            raise PatternError(f"{self.name}: scope must be 'global' or 'layer', not {scope!r}")
        self.rows, self.columns = sides
        self.scope = scope
        self.sparsities, named, self._levels = checked_sparsities(self._title(), sparsities, rounds, rate)
        options = {"block": [self.rows, self.columns]}
        self._subnets = tuple(replace(s, pattern=self.name, options=options) for s in named)

    def _title(self) -> str:
        return f"block{self.rows}x{self.columns}"

    def subnets(self) -> tuple[Subnet, ...]:
        """Its subnetworks, from the least sparse to the most."""
        return self._subnets

    def mask(self, subnet: Subnet, umg: UMG) -> Mask:
        """Of the blocks kept so far the least go, until the asked count is gone."""
        before = umg.previous.elements if umg.previous is not None else {}
        norms = {w.name: self._norms(w, umg.ranked[w.name]) for w in umg.eligible}
        remaining = {
            w.name: self._tiles_kept(w, before[w.name]).to(norms[w.name].device)
            if w.name in before
            else torch.ones_like(norms[w.name], dtype=torch.bool)
            for w in umg.eligible
        }
        keep: dict[str, Tensor] = {}
        for names, count in self._pools(remaining, subnet.sparsity, umg.comparison):
            keep |= drop_smallest({n: norms[n] for n in names}, {n: remaining[n] for n in names}, count)
        return Mask({w.name: self._spread(w, keep[w.name].cpu()) for w in umg.eligible})

    def _pools(
        self, remaining: Mapping[str, Bool[Tensor, " tiles"]], sparsity: float, comparison: Comparison
    ) -> list[tuple[list[str], int]]:
        """Which weights' blocks are ranked together, and how many of them go."""
        sizes = torch.tensor([r.numel() for r in remaining.values()])
        masked = torch.tensor([int((~r).sum()) for r in remaining.values()])
        if self.scope == "layer":
            counts = [round(sparsity * int(n)) - int(m) for n, m in zip(sizes, masked, strict=True)]
            return [([name], count) for name, count in zip(remaining, counts, strict=True)]
        count = round(sparsity * int(sizes.sum())) - int(masked.sum())
        if comparison == "global":
            return [(list(remaining), count)]
        # the score does not compare one weight with another, so each loses the same share
        return [([n], c) for n, c in zip(remaining, apportion(sizes, masked, sparsity, count).tolist(), strict=True)]

    def _norms(self, weight: Weight, value: Tensor) -> Float32[Tensor, " tiles"]:
        return tiles(weight, value.detach(), self.rows, self.columns).abs().sum((1, 2), dtype=torch.float32)

    def _tiles_kept(self, weight: Weight, keep: Bool[Tensor, "..."]) -> Bool[Tensor, " tiles"]:
        return tiles(weight, keep, self.rows, self.columns).any(2).any(1)

    def _spread(self, weight: Weight, keep: Bool[Tensor, " tiles"]) -> Bool[Tensor, "..."]:
        return untiles(weight, keep[:, None, None].expand(-1, self.rows, self.columns), True)

    def exact_sparsity(self, subnet: Subnet, mask: Mask, umg: UMG) -> float:
        """Zeros among the weights covered, which is the share of blocks that are gone."""
        del subnet
        return zeros_among_covered(mask, umg, self._covered)

    def check(self, subnet: Subnet, mask: Mask, umg: UMG) -> None:
        """Exactly ``round(sparsity * n)`` of the n blocks go, each as a whole, and what fills no block is kept.

        Raises:
            PatternError: It is not so.
        """
        total = gone = unsure = 0
        for weight, keep, hidden in weight_masks(subnet, mask, umg):
            count = self._covered(weight) // (self.rows * self.columns)
            lost, open_ = (0, 0) if keep is None else self._gone(subnet, weight, keep, hidden)
            if self.scope == "layer":
                self._check_count(subnet, f"{weight.name!r}", count, lost, open_)
            total, gone, unsure = total + count, gone + lost, unsure + open_
        if self.scope == "global":
            self._check_count(subnet, "the eligible weights", total, gone, unsure)

    def _gone(self, subnet: Subnet, weight: Weight, keep: Tensor, hidden: Tensor | None) -> tuple[int, int]:
        """How many blocks of a weight are gone, and of how many it cannot be told."""
        blocks = tiles(weight, keep, self.rows, self.columns).flatten(1)
        visible = keep if hidden is None else keep | hidden  # hidden elements may have been kept
        inside = blocks if hidden is None else tiles(weight, visible, self.rows, self.columns).flatten(1)
        stays, goes = blocks.any(1), ~inside.all(1)
        if bool((stays & goes).any()):
            refuse(subnet, f"{int((stays & goes).sum())} blocks of {weight.name!r} are kept in part")
        if int(visible.count_nonzero()) - int(inside.count_nonzero()) != weight.numel - inside.numel():
            refuse(subnet, f"weights of {weight.name!r} are masked that lie in no block")
        return int(goes.sum()), int((~stays & ~goes).sum())

    def _check_count(self, subnet: Subnet, of: str, count: int, gone: int, unsure: int) -> None:
        wanted = round(subnet.sparsity * count)
        if not gone <= wanted <= gone + unsure:
            refuse(subnet, f"{gone} of the {count} blocks of {of} are masked, not {wanted}")

    def coverage(self, subnet: Subnet, mask: Mask, umg: UMG) -> float:
        """The share of eligible weights that lie in full blocks."""
        del subnet, mask
        return covered_share(umg, self._covered)

    def _covered(self, weight: Weight) -> int:
        return covered_by_tiles(weight, self.rows, self.columns)

    def config(self) -> dict[str, Any]:
        """Keyword arguments that make an equal pattern."""
        return {**self._size(), **self._levels, "scope": self.scope}

    def _size(self) -> dict[str, Any]:
        return {"size": [self.rows, self.columns]}

    @classmethod
    def parse(cls, spec: str) -> Self | None:
        """``"block8x4"`` and ``"block8x4@0.5"``; without a size, 4x4."""
        found = re.fullmatch(r"block(?:(\d+)x(\d+))?", spec.partition("@")[0].strip())
        if not found:
            return None
        size = (int(found[1]), int(found[2])) if found[1] else (4, 4)
        return cls(size, **level_of(spec))

    def merged(self, other: Self) -> Self:
        """The levels of both, where they are of one size and scope."""
        if self._size() != other._size() or self.scope != other.scope:
            raise PatternError(f"a net has {self.name!r} of one size and one scope; given are {self!r} and {other!r}")
        return super().merged(other)


@register_pattern("vector")
class Vector(Block):
    """Runs of N consecutive input channels of one output go as a whole: blocks of 1 x N (see :class:`Block`).

    Args:
        length: N.
        sparsities: Ascending, in [0, 1]: the share of runs that go; by default ``1 - (1 - rate)^k`` for k = 1 … rounds.
        rounds: Number of default levels.
        rate: Share of the kept runs that each default level removes.
        scope: ``"global"``: runs are ranked over all weights; ``"layer"``: the share goes from every weight.

    Raises:
        PatternError: An argument makes no sense.
    """

    def __init__(
        self,
        length: int = 4,
        sparsities: Sequence[float] | None = None,
        rounds: int = 10,
        rate: float = 0.2,
        scope: str = "global",
    ) -> None:
        super().__init__((1, length), sparsities, rounds, rate, scope)

    def _title(self) -> str:
        return f"vector{self.columns}"

    def _size(self) -> dict[str, Any]:
        return {"length": self.columns}

    @classmethod
    def parse(cls, spec: str) -> Self | None:
        """``"vector8"`` and ``"vector8@0.5"``; without a length, 4."""
        found = re.fullmatch(r"vector(\d+)?", spec.partition("@")[0].strip())
        if not found:
            return None
        return cls(int(found[1] or 4), **level_of(spec))
