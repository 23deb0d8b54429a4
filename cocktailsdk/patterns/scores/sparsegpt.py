"""SparseGPT's saliency (Frantar and Alistarh, "Massive Language Models Can Be Accurately Pruned in One-Shot")."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from ...errors import PatternError
from ...graph import Weight
from .base import Observed, Score
from .matrices import as_matrices, from_matrices
from .registry import register_score

__all__ = ["SparseGPT", "damped"]

DAMPING = 0.01
"""Added to the diagonal of the Hessian, as a share of the diagonal's mean (SparseGPT, Section 4)."""


def damped(gram: Float[Tensor, "parts n n"], share: float = DAMPING) -> Float[Tensor, "parts n n"]:
    """A copy of a gram matrix in which every feature has some energy, so that it can be inverted.

    Args:
        gram: ``XᵀX`` of each part.
        share: What is added to the diagonal, as a share of the diagonal's mean.
    """
    out = gram.clone()
    diagonal = out.diagonal(dim1=-2, dim2=-1)
    mean = diagonal.mean(-1, keepdim=True)
    diagonal += torch.where(mean > 0, share * mean, 1.0)
    return out


@register_score("sparsegpt")
class SparseGPT(Score):
    """``|w| / √[H⁻¹]ₚₚ`` with ``H = XᵀX``: how much a layer's output must change if the weight goes and the others of
    its row make up for it as well as they can (SparseGPT, Equation 4; Optimal Brain Surgeon). Compared within a weight.

    SparseGPT updates weights while it chooses them. Here, masks are chosen by the weights as they are, so that they can
    share them; :func:`cocktailsdk.reconstruct` makes the update.
    """

    needs = frozenset({"gram"})
    comparison = "layer"

    def summary(self, observed: Observed) -> Mapping[str, Tensor]:
        """The inverse's diagonal."""
        if observed.gram is None:
            raise PatternError(f"score {self.name!r} needs the products of inputs, and they were not observed")
        factor = torch.linalg.cholesky(damped(observed.gram))
        return {"inverse": torch.cholesky_inverse(factor).diagonal(dim1=-2, dim2=-1).clone()}

    def elements(self, weight: Weight, value: Tensor, summary: Mapping[str, Tensor]) -> Tensor:
        """Magnitudes over the roots of their features' diagonal."""
        inverse = summary["inverse"].to(value.device)
        parts = as_matrices(weight, value.detach()).to(inverse.dtype).abs()
        return from_matrices(weight, parts * inverse.rsqrt()[:, None, :])
