"""Wanda: weights and activations (Sun et al., "A Simple and Effective Pruning Approach for Large Language Models")."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ...graph import Weight
from .base import Observed, Score, input_norms
from .matrices import as_matrices, from_matrices
from .registry import register_score

__all__ = ["Wanda"]


@register_score("wanda")
class Wanda(Score):
    """``|w| · ‖x‖₂``, compared within each output row (Wanda, Equation 1).

    ``‖x‖₂`` is the norm of the weight's input feature over all calibration tokens, or positions of a convolution.
    """

    needs = frozenset({"squares"})
    comparison = "row"

    def summary(self, observed: Observed) -> Mapping[str, Tensor]:
        """The input features' norms."""
        return {"norms": input_norms(self, observed)}

    def elements(self, weight: Weight, value: Tensor, summary: Mapping[str, Tensor]) -> Tensor:
        """Magnitudes times their input features' norms."""
        norms = summary["norms"].to(value.device)
        parts = as_matrices(weight, value.detach()).to(norms.dtype).abs()
        return from_matrices(weight, parts * norms[:, None, :])
