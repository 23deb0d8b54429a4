"""Unstructured sparsity: single weights, ranked by score, by default by magnitude over the whole network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..masks import Mask
from .base import UMG, Pattern, Subnet, checked_sparsities
from .checking import refuse, weight_masks
from .comparison import drop_least
from .registry import register_pattern


@register_pattern("unstructured")
class Unstructured(Pattern):
    """Pruning of single weights by score, nested over its levels (paper, Section 3.2).

    Exactly ``round(sparsity * total)`` of the eligible weights are zero. Each level ranks the weights that the level
    before has kept; ties are broken by position. By default magnitudes are ranked over the whole network. Another score
    may rank within each weight or within each of its rows; then each has the same share of zeros.

    Args:
        sparsities: Ascending, in [0, 1]; by default ``1 - (1 - rate)^k`` for k = 1 … rounds.
        rounds: Number of default levels.
        rate: Share of the kept weights that each default level removes.

    Raises:
        PatternError: An argument makes no sense.
    """

    term = "unstructured"

    def __init__(self, sparsities: Sequence[float] | None = None, rounds: int = 10, rate: float = 0.2) -> None:
        self.sparsities, self._subnets, self._levels = checked_sparsities(self.name, sparsities, rounds, rate)

    def subnets(self) -> tuple[Subnet, ...]:
        """Its subnetworks, from the least sparse to the most."""
        return self._subnets

    def mask(self, subnet: Subnet, umg: UMG) -> Mask:
        """Drop the smallest of the weights kept so far, until the asked count is zero."""
        keep = umg.previous.elements if umg.previous is not None else {}
        keep = {w.name: keep[w.name] for w in umg.eligible if w.name in keep}
        kept = drop_least(umg.eligible, umg.ranked, keep, subnet.sparsity, umg.comparison)
        return Mask({name: k.cpu() for name, k in kept.items()})

    def check(self, subnet: Subnet, mask: Mask, umg: UMG) -> None:
        """Exactly ``round(sparsity * total)`` of the eligible weights are zero.

        Raises:
            PatternError: Another number is.
        """
        total = sum(w.numel for w in umg.eligible)
        wanted, zeros, hidden = round(subnet.sparsity * total), 0, 0
        for _, keep, unseen in weight_masks(subnet, mask, umg):
            if keep is not None:
                zeros += keep.numel() - int(keep.count_nonzero())
                hidden += 0 if unseen is None else int(unseen.count_nonzero())
        if not zeros - hidden <= wanted <= zeros:
            refuse(subnet, f"{zeros} of its {total} eligible weights are masked, not {wanted}")

    def config(self) -> dict[str, Any]:
        """Keyword arguments that make an equal pattern."""
        return dict(self._levels)
