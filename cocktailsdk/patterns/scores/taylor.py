"""First-order change of the loss (Molchanov et al., "Importance Estimation for Neural Network Pruning")."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ...errors import PatternError
from ...graph import Weight
from .base import Observed, Score
from .registry import register_score

__all__ = ["Taylor"]


@register_score("taylor")
class Taylor(Score):
    """``|w · ∂L/∂w|``, with the gradient of the mean loss over the calibration data (Molchanov et al., Equation 8)."""

    needs = frozenset({"gradients"})

    def summary(self, observed: Observed) -> Mapping[str, Tensor]:
        """The gradient."""
        if observed.gradient is None:
            raise PatternError(f"score {self.name!r} needs gradients, and they were not observed")
        return {"gradient": observed.gradient}

    def elements(self, weight: Weight, value: Tensor, summary: Mapping[str, Tensor]) -> Tensor:
        """The products' magnitudes."""
        del weight
        gradient = summary["gradient"].to(value.device)
        return (value.detach().to(gradient.dtype) * gradient).abs()
