"""Attention heads: whole heads go, the same share of every attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..graph import Coupling, Group
from .registry import register_pattern
from .unit_groups import head_groups
from .unit_patterns import UnitPattern

__all__ = ["Heads"]


@register_pattern("heads")
class Heads(UnitPattern):
    """Removes the same share of heads from every attention, nested over its levels; all other channels stay.

    Of an attention's n heads exactly ``round(sparsity * n)`` go, never all, with their rows of the projections of
    queries, keys and values and their columns of the one that follows. Those of least score go (the channel score).

    Args:
        sparsities: Ascending, in [0, 1]; by default ``1 - (1 - rate)^k`` for k = 1 … rounds.
        rounds: Number of default levels.
        rate: Share of the kept heads that each default level removes.
        beta: Weight of the unstructured term in the score; the N:M term has the rest.
        scope: ``"group"``: the same share of every attention's heads. ``"global"``: the heads of all attentions are
            ranked together, and exactly ``round(sparsity * n)`` of all n heads go, never all of an attention.

    Raises:
        PatternError: An argument makes no sense; when masks are made, that no heads can go.
    """

    def __init__(
        self,
        sparsities: Sequence[float] | None = None,
        rounds: int = 10,
        rate: float = 0.1,
        beta: float = 0.8,
        scope: str = "group",
    ) -> None:
        super().__init__(sparsities, rounds, rate, beta, 1, scope)

    def groups(self, coupling: Coupling) -> tuple[Group, ...]:
        """The groups whose units are heads."""
        return head_groups(coupling)

    def nothing(self, coupling: Coupling) -> str:
        """Why no head can go."""
        del coupling
        return "no attention heads of this model can go; cocktailsdk.inspect says what can, and why the rest is kept"

    def config(self) -> dict[str, Any]:
        """What :meth:`Pattern.from_config` makes an equal pattern from."""
        return {key: value for key, value in super().config().items() if key != "round_to"}
