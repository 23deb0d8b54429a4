"""What a score is: how much each weight, channel unit or layer matters, judged from data.

A score is pure arithmetic on tensors. Calibration (:mod:`cocktailsdk.calibration`) runs the model and hands it what it
observed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from ...errors import PatternError
from ...graph import Coupling, Weight

__all__ = ["Comparison", "Layers", "Need", "Observed", "Routed", "Score", "input_norms"]

Comparison = Literal["global", "layer", "row"]
"""Within what elements compete: all eligible weights, each weight, or each output row of a weight."""

Need = Literal["squares", "gram", "gradients", "changes", "trials"]
"""What a score wants observed: sums of squares of inputs, their products with one another, gradients of the loss, what
layers change of the stream, or the loss without some layers."""


@dataclass(frozen=True)
class Observed:
    """What calibration observed of a weight, summed over examples and positions.

    Weights are seen as matrices, ``parts`` of them where a weight holds several (experts, convolution groups); see
    :func:`cocktailsdk.patterns.scores.matrices.as_matrices`.

    Attributes:
        rows: How many inputs each part had: tokens, or positions of a convolution.
        squares: Sum of squares of each input feature.
        gram: Products of input features with one another, ``XᵀX``; where a score needs it.
        gradient: Mean over batches of the loss's gradient with respect to the weight.
        gradient_squares: Mean over batches of its square.
    """

    rows: tuple[int, ...] = ()
    squares: Float[Tensor, "parts features"] | None = None
    gram: Float[Tensor, "parts features features"] | None = None
    gradient: Float[Tensor, "..."] | None = None
    gradient_squares: Float[Tensor, "..."] | None = None


@dataclass(frozen=True)
class Layers:
    """What calibration finds out about layers and residual branches, which can be dropped.

    Attributes:
        names: Paths of layers, or names of branches, in order of execution.
        cosines: By name, the mean cosine similarity of the stream before and after; where a score needs it.
        loss_without: The mean loss on the calibration data if some of them are dropped; where a score needs it.
        most: The largest number of them that a subnetwork drops.
    """

    names: tuple[str, ...]
    cosines: Mapping[str, float] = field(default_factory=dict)
    loss_without: Callable[[Sequence[str]], float] | None = None
    most: int = 0


@dataclass(frozen=True)
class Routed:
    """What calibration observed of the experts of a mixture.

    Attributes:
        tokens: How many tokens were given to each expert.
        norms: Sum over these tokens of the L2 norm of the expert's output times the router's weight for it.
    """

    tokens: Int64[Tensor, " experts"]
    norms: Float64[Tensor, " experts"]


class Score:
    """Base class of all scores. Override one or several of :meth:`elements`, :meth:`units`, :meth:`layers`,
    :meth:`experts`.

    What is not defined is derived where that makes sense: a score of elements scores units by unified mask generation
    (the sum over a unit's rows), and layers by the mean over their weights. Scores of units or layers do not score
    elements.

    Attributes:
        name: Its registered name, set by :func:`register_score`.
        needs: What calibration has to observe; empty for a score of the weights alone.
        comparison: Within what elements compete. N:M and blocks compare within their runs and blocks anyway.
    """

    name: ClassVar[str] = ""
    needs: ClassVar[frozenset[Need]] = frozenset()
    comparison: ClassVar[Comparison] = "global"

    def summary(self, observed: Observed) -> Mapping[str, Tensor]:
        """What of the observations is kept until masks are made; small where it can be, since all weights' are kept.

        By default nothing.
        """
        del observed
        return {}

    def elements(self, weight: Weight, value: Float[Tensor, "..."], summary: Mapping[str, Tensor]) -> Tensor:
        """The score of each element of a weight, not negative; of the weight's shape.

        Args:
            weight: The weight.
            value: Its current values.
            summary: Of what was observed of it; see :meth:`summary`.
        """
        raise self._undefined("elements")

    def units(
        self, coupling: Coupling, values: Mapping[str, Tensor], summaries: Mapping[str, Mapping[str, Tensor]]
    ) -> Float[Tensor, " units"]:
        """The score of each channel unit.

        Args:
            coupling: The model's coupling.
            values: The weights by name.
            summaries: By weight name.
        """
        raise self._undefined("units")

    def layers(self, found: Layers) -> Mapping[str, float]:
        """The score of each layer or branch by name; the least go first.

        Args:
            found: What calibration found out.
        """
        raise self._undefined("layers")

    def experts(self, routed: Routed) -> Float64[Tensor, " experts"]:
        """The score of each expert of a mixture; the least go first.

        Args:
            routed: What calibration observed of them.
        """
        raise self._undefined("experts")

    def _undefined(self, what: str) -> PatternError:
        return PatternError(f"score {self.name!r} is not defined for {what}; override {type(self).__name__}.{what}")

    @classmethod
    def scores_elements(cls) -> bool:
        """Whether it scores single elements."""
        return cls.elements is not Score.elements

    @classmethod
    def scores_units(cls) -> bool:
        """Whether it scores units by itself, not as sums over elements."""
        return cls.units is not Score.units

    @classmethod
    def scores_layers(cls) -> bool:
        """Whether it scores layers by itself, not as means over elements."""
        return cls.layers is not Score.layers

    @classmethod
    def scores_experts(cls) -> bool:
        """Whether it scores whole experts by itself, not as means over elements."""
        return cls.experts is not Score.experts


def input_norms(score: Score, observed: Observed) -> Float[Tensor, "parts features"]:
    """The norm of each input feature over all rows. A part that no input reached (an expert) has norms of 1, so that
    it is ranked by magnitude.

    Raises:
        PatternError: Inputs were not observed.
    """
    if observed.squares is None:
        raise PatternError(f"score {score.name!r} needs inputs, and they were not observed")
    reached = torch.tensor(observed.rows, device=observed.squares.device)[:, None] > 0
    return torch.where(reached, observed.squares.sqrt(), 1.0)
