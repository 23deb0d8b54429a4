"""Magnitude: needs no data."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ...graph import Weight
from .base import Score
from .registry import register_score

__all__ = ["Magnitude"]


@register_score("magnitude")
class Magnitude(Score):
    """``|w|``, compared over all weights (paper, Section 3.2). The default."""

    def elements(self, weight: Weight, value: Tensor, summary: Mapping[str, Tensor]) -> Tensor:
        """The weight itself: patterns rank by its magnitude."""
        del weight, summary
        return value
