"""The importance of every unit, for ``slim``."""

from __future__ import annotations

import warnings

from jaxtyping import Float64
from torch import Tensor, nn

from ..graph import Coupling
from ..patterns.scoring import ScoreLike
from .scoring import UnitScoring

__all__ = ["Importance", "scores_of"]

Importance = ScoreLike
"""Deprecated: the name of :data:`~cocktailsdk.patterns.scoring.ScoreLike` in the version before."""


def scores_of(model: nn.Module, coupling: Coupling, importance: ScoreLike, scope: str) -> Float64[Tensor, " units"]:
    """Deprecated: use :meth:`cocktailsdk.slimming.scoring.UnitScoring.of_units`."""
    warnings.warn(
        "scores_of(model, coupling, importance, scope) is UnitScoring.of(importance).of_units(model, coupling, (), "
        "scope) of cocktailsdk.slimming.scoring now; the old function goes with the next version",
        DeprecationWarning,
        stacklevel=2,
    )
    return UnitScoring.of(importance).of_units(model, coupling, (), scope)
