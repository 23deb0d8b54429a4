"""Feed-forward width: channels inside MLPs go, the same share of each; streams and heads stay."""

from __future__ import annotations

from collections.abc import Sequence

from ..graph import Coupling, Group
from .registry import register_pattern
from .unit_groups import mlp_groups
from .unit_patterns import UnitPattern

__all__ = ["MLP"]


@register_pattern("mlp")
class MLP(UnitPattern):
    """Removes the same share of the hidden channels of every MLP, nested over its levels; all other channels stay.

    A unit is a row of the projections into the MLP and a column of the one out of it. Where an MLP has experts, it is
    the same hidden channel of each of them. Of an MLP's n units exactly ``round(sparsity * n)`` go, never all.

    Args:
        sparsities: Ascending, in [0, 1]; by default ``1 - (1 - rate)^k`` for k = 1 … rounds.
        rounds: Number of default levels.
        rate: Share of the kept units that each default level removes.
        beta: Weight of the unstructured term in the score; the N:M term has the rest.
        round_to: Channels kept are rounded to a multiple of this; ``"auto"``: 8 in groups of 256 channels and more.
        scope: ``"group"``: the same share of every MLP. ``"global"``: the units of all MLPs are ranked together, and
            exactly ``round(sparsity * n)`` of all n units go, never all of an MLP; then ``round_to`` is applied.

    Raises:
        PatternError: An argument makes no sense; when masks are made, that the model has no MLP whose width can go.
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
        """The groups of feed-forward channels."""
        return mlp_groups(coupling)

    def nothing(self, coupling: Coupling) -> str:
        """Why no feed-forward channel can go."""
        others = ", write 'channel@0.5' to narrow the channels that this model has" if coupling.groups else ""
        return (
            "this model has no feed-forward channels that can go, between two projections of one residual branch"
            f"{others}; cocktailsdk.inspect lists every channel group, and why the rest is kept"
        )
