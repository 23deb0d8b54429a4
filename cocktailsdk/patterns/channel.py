"""Channel sparsity: whole units of coupled channels, the same share of every group."""

from __future__ import annotations

from collections.abc import Sequence

from ..graph import Coupling, Group
from ..masks import Mask
from .base import UMG, Pattern, Subnet
from .registry import register_pattern
from .unit_patterns import UnitPattern


@register_pattern("channel")
class Channel(UnitPattern):
    """Removes the same share of channel units from every group (paper, Section 3.2), nested over its levels.

    Of a group's n units exactly ``round(sparsity * n)`` go, never all. About ``1 - (1 - sparsity)²`` of the weights
    go with them.

    Args:
        sparsities: Ascending, in [0, 1]; by default ``1 - (1 - rate)^k`` for k = 1 … rounds.
        rounds: Number of default levels.
        rate: Share of the kept units that each default level removes.
        beta: Weight of the unstructured mask in the score; the N:M mask has the rest.
        round_to: Channels kept are rounded to a multiple of this; ``"auto"``: 8 in groups of 256 channels and more.
        scope: ``"group"``: the same share of every group. ``"global"``: the units of all groups are ranked together,
            each by its score divided by the mean of its group's. Exactly ``round(sparsity * n)`` of all n units go,
            never all of a group. ``round_to`` is applied to each group afterwards.

    Raises:
        PatternError: An argument makes no sense.
    """

    def __init__(
        self,
        sparsities: Sequence[float] | None = None,
        rounds: int = 10,
        rate: float = 0.1,
        beta: float = 0.8,
        round_to: int | str | None = "auto",
        scope: str = "group",
    ) -> None:
        super().__init__(sparsities, rounds, rate, beta, round_to, scope)

    def groups(self, coupling: Coupling) -> tuple[Group, ...]:
        """All channel groups."""
        return coupling.groups

    def nothing(self, coupling: Coupling) -> str | None:
        """A model without channel groups is refused with its reasons where all patterns are looked at together."""
        del coupling
        return None

    def coverage(self, subnet: Subnet, mask: Mask, umg: UMG) -> float:
        """1: the score of every group counts."""
        return Pattern.coverage(self, subnet, mask, umg)
