"""Attention heads: whole heads go, the same share of every attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..errors import PatternError
from ..graph import Coupling, Group
from ..masks import Mask
from .base import UMG, Pattern, Subnet, checked_sparsities
from .channel import checked_beta, kept_units, removed_units, unit_scores
from .checking import check_units
from .registry import register_pattern

__all__ = ["Heads", "head_groups"]


def head_groups(coupling: Coupling) -> tuple[Group, ...]:
    """The channel groups whose units are attention heads.

    A head is a unit of several channels along which activations are multiplied with activations one by one: queries
    with keys, and weights with values. Where heads share keys and values, a unit is one such set.
    """
    batched: set[int] = set()
    for c in coupling.contractions:
        for units in c.factors if c.weight is None else ():
            if units.ndim > 2:  # the last two are the matrices' own
                heads = units.flatten(-2)[..., 0]
                batched.update(torch.unique(heads[heads >= 0]).tolist())
    return tuple(g for g in coupling.groups if g.channels > 1 and batched.issuperset(range(g.start, g.stop)))


@register_pattern("heads")
class Heads(Pattern):
    """Removes the same share of heads from every attention, nested over its levels; all other channels stay.

    Of an attention's n heads exactly ``round(sparsity * n)`` go, never all, with their rows of the projections of
    queries, keys and values and their columns of the one that follows. Those of least score go (the channel score).

    Args:
        sparsities: Ascending, in [0, 1]; by default ``1 - (1 - rate)^k`` for k = 1 … rounds.
        rounds: Number of default levels.
        rate: Share of the kept heads that each default level removes.
        beta: Weight of the unstructured term in the score; the N:M term has the rest.

    Raises:
        PatternError: An argument makes no sense; when masks are made, that no heads can go.
    """

    after = ("unstructured", "n:m")
    removes_units = True
    ranks = "units"

    def __init__(
        self, sparsities: Sequence[float] | None = None, rounds: int = 10, rate: float = 0.1, beta: float = 0.8
    ) -> None:
        self.sparsities, self._subnets, self._levels = checked_sparsities(self.name, sparsities, rounds, rate)
        self.beta = checked_beta(self.name, beta)

    def subnets(self) -> tuple[Subnet, ...]:
        """Its subnetworks, from the most heads to the fewest."""
        return self._subnets

    def mask(self, subnet: Subnet, umg: UMG) -> Mask:
        """The heads of least score go."""
        groups = head_groups(umg.coupling)
        if not groups:
            raise PatternError(
                f"{subnet.name!r}: no attention heads of this model can go; cocktailsdk.inspect says what can, and why "
                "the rest is kept"
            )
        previous = umg.previous.removed if umg.previous is not None else None
        scores = unit_scores(umg, self.beta)
        return Mask(removed=removed_units(scores, umg.coupling, subnet.sparsity, previous, groups=groups))

    def exact_sparsity(self, subnet: Subnet, mask: Mask, umg: UMG) -> float:
        """Removed heads among all."""
        del subnet
        n = sum(g.size for g in head_groups(umg.coupling))
        return int(mask.removed.sum()) / n if mask.removed is not None and n else 0.0

    def check(self, subnet: Subnet, mask: Mask, umg: UMG) -> None:
        """Of every attention exactly as many heads go as asked for, and no other units.

        Raises:
            PatternError: Another number does, or single elements are masked.
        """
        groups = head_groups(umg.coupling)
        check_units(subnet, mask, {g: g.size - kept_units(g, subnet.sparsity) for g in groups})

    def coverage(self, subnet: Subnet, mask: Mask, umg: UMG) -> float:
        """The share of the eligible weights that belong to heads."""
        del subnet, mask
        every = torch.zeros(umg.coupling.n_units, dtype=torch.bool)
        for g in head_groups(umg.coupling):
            every[g.start : g.stop] = True
        keep = umg.coupling.left(every)
        total = sum(w.numel for w in umg.eligible)
        stays = sum(
            int(k.sum()) * (w.numel // k.numel()) if (k := keep.get(w.name)) is not None else w.numel
            for w in umg.eligible
        )
        return 1.0 - stays / total if total else 0.0

    def config(self) -> dict[str, Any]:
        """Keyword arguments that make an equal pattern."""
        return {**self._levels, "beta": self.beta}
