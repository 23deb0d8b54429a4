"""Second-order change of the loss (LeCun et al., "Optimal Brain Damage"), with the empirical Fisher information."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ...errors import PatternError
from ...graph import Weight
from .base import Observed, Score
from .registry import register_score

__all__ = ["Fisher"]


@register_score("fisher")
class Fisher(Score):
    """``w² · E[(∂L/∂w)²] / 2`` (Optimal Brain Damage, Equation 5).

    The Hessian's diagonal is estimated by the squares of gradients, of one calibration batch each.
    """

    needs = frozenset({"gradients"})

    def summary(self, observed: Observed) -> Mapping[str, Tensor]:
        """The mean of the squares of gradients."""
        if observed.gradient_squares is None:
            raise PatternError(f"score {self.name!r} needs gradients, and they were not observed")
        return {"squares": observed.gradient_squares}

    def elements(self, weight: Weight, value: Tensor, summary: Mapping[str, Tensor]) -> Tensor:
        """Half the weights' squares times those of their gradients."""
        del weight
        squares = summary["squares"].to(value.device)
        return value.detach().to(squares.dtype).square() * squares / 2
