"""How much of its consumers' outputs a unit carries (Muralidharan et al., "Minitron"; NVIDIA ModelOpt)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from ...errors import PatternError
from ...graph import Coupling, Weight
from .base import Observed, Routed, Score, input_norms
from .matrices import as_matrices
from .registry import register_score

__all__ = ["Activation"]


@register_score("activation")
class Activation(Score):
    """Of channel units and heads: the sum of ``‖x‖₂ · ‖W[:, x]‖₂`` over the inputs ``x`` that a unit feeds.

    A product is the norm of what the input adds to a weight's outputs, if outputs are summed as independent. Each
    weight's products are divided by their mean, so that no layer dominates a residual stream. Where one weight consumes
    a unit, as in the feed-forward part of a transformer, this is Wanda's score of the weight's column.

    Of whole experts of a mixture: the mean, over the tokens given to an expert, of the L2 norm of its output times the
    router's weight for it (Lasby et al. 2025, "REAP the Experts"). An expert without tokens has the score 0.
    """

    needs = frozenset({"squares"})

    def summary(self, observed: Observed) -> Mapping[str, Tensor]:
        """The input features' norms."""
        return {"norms": input_norms(self, observed)}

    def units(
        self, coupling: Coupling, values: Mapping[str, Tensor], summaries: Mapping[str, Mapping[str, Tensor]]
    ) -> Float64[Tensor, " units"]:
        """Sums over each unit's consumers.

        Raises:
            PatternError: Nothing was observed of what consumes a group.
        """
        scores = torch.zeros(coupling.n_units, dtype=torch.float64)
        seen = torch.zeros(coupling.n_units, dtype=torch.bool)
        for weight in coupling.weights:
            if not summaries.get(weight.name):
                continue
            for units in _columns(coupling, weight):
                has_unit = units >= 0
                norms = summaries[weight.name]["norms"]
                columns = as_matrices(weight, values[weight.name].detach()).to(norms.dtype).norm(dim=1)
                products = (norms.to(columns.device) * columns).cpu().double()[has_unit]
                mean = float(products.mean())
                seen[units[has_unit]] = True
                if mean > 0.0:
                    scores.index_add_(0, units[has_unit], products / mean)
        for group in coupling.groups:
            if not bool(seen[group.start : group.stop].all()):
                raise PatternError(
                    f"score {self.name!r}: the inputs that the channels of {group.name!r} feed were not observed; "
                    "leave that part out with exclude_modules, or choose a score of elements, such as 'wanda'"
                )
        return scores

    def experts(self, routed: Routed) -> Float64[Tensor, " experts"]:
        """Router-weighted norms of outputs."""
        return routed.norms / routed.tokens.clamp(min=1)


def _columns(coupling: Coupling, weight: Weight) -> Iterator[Int64[Tensor, "parts features"]]:
    """Which unit feeds which input feature of a weight, for each of its unit fields that varies along its inputs."""
    for units in coupling.fields.get(weight.name, ()):
        if units.shape[weight.in_axis] > 1 and units.shape[weight.out_axis] == 1:
            yield as_matrices(weight, units.expand(weight.shape))[:, 0]
