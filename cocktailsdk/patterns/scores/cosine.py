"""How much a layer changes the stream (Men et al., "ShortGPT: Layers in LLMs are More Redundant Than You Expect")."""

from __future__ import annotations

from collections.abc import Mapping

from .base import Layers, Score
from .registry import register_score

__all__ = ["Cosine"]


@register_score("cosine")
class Cosine(Score):
    """Of whole layers: one minus the cosine similarity of the stream before and after, in the mean over all positions
    (ShortGPT, Equation 1: Block Influence)."""

    needs = frozenset({"changes"})

    def layers(self, found: Layers) -> Mapping[str, float]:
        """What each layer changes."""
        return {name: 1.0 - found.cosines[name] for name in found.names}
