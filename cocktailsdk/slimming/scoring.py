"""By what ``slim`` ranks units: a score, and the data that it is judged from."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float64
from torch import Tensor, nn

from ..calibration import CalibrationData, calibrate
from ..errors import PatternError
from ..graph import Coupling, Weight
from ..graph.weight_graph import run_weight_graph
from ..patterns.base import UMG
from ..patterns.channel import Channel
from ..patterns.scores import Score
from ..patterns.scoring import PatternScores, ScoreFunction, ScoreLike, needs_data, resolve_scores
from ..patterns.unit_choice import comparable
from ..patterns.unit_scores import unit_scores
from ..utils.losses import ForwardFn, LossFn
from ..utils.undo import unchanged

__all__ = ["UnitScoring"]

PATTERN = Channel()
"""Scores are for patterns: units are ranked as this one ranks them."""


@dataclass(frozen=True)
class UnitScoring:
    """By what units are ranked.

    Attributes:
        score: A score, or a function that returns a score for each unit or scores of elements.
        data: The calibration data; ``None`` where the score needs none.
        loss_fn: For scores that need the loss.
        forward_fn: How the model is run on the data.
    """

    score: Score | ScoreFunction
    data: CalibrationData | None = None
    loss_fn: LossFn | None = None
    forward_fn: ForwardFn | None = None

    @classmethod
    def of(
        cls,
        score: ScoreLike,
        calibration: Iterable[Any] | CalibrationData | None = None,
        loss_fn: LossFn | None = None,
        forward_fn: ForwardFn | None = None,
    ) -> UnitScoring:
        """The score that the user named, checked, and its data, read.

        Raises:
            PatternError: The score is unknown, ranks no channel units, or needs data that is not given.
        """
        resolved = resolve_scores(score, [PATTERN])
        data = None
        if needs_data(resolved):
            if calibration is None:
                raise PatternError(f"score {score!r} is judged from data: give calibration=loader")
            data = CalibrationData.of(calibration)
        return cls(resolved[PATTERN.name], data, loss_fn, forward_fn)

    def of_units(
        self, model: nn.Module, coupling: Coupling, eligible: tuple[Weight, ...], scope: str
    ) -> Float64[Tensor, " units"]:
        """The score of every unit, comparable among the units that are ranked together.

        Scores (:func:`cocktailsdk.patterns.unit_scores.unit_scores`) are divided by their mean over the group where
        groups are compared with one another. What scores units by itself is taken as it is.

        Raises:
            PatternError: A function returned something else than scores; or see
                :func:`~cocktailsdk.calibration.calibrate`.
        """
        scores = PatternScores({PATTERN.name: self.score})
        if self.data is not None:
            with unchanged(model):
                scores = calibrate(
                    model, coupling, eligible, [PATTERN], self.score, self.data, self.loss_fn, self.forward_fn
                )
        umg = UMG(coupling, eligible, _values(model, coupling))
        umg = scores.seen_by(PATTERN, umg, PATTERN.subnets()[0])
        units = unit_scores(umg, 1.0)
        return comparable(units, coupling.groups) if scope == "global" and umg.unit_scores is None else units


def _values(model: nn.Module, coupling: Coupling) -> dict[str, Tensor]:
    """All parameters, and the weights that the model computes from them."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    graphs = coupling.trace.computed if coupling.trace is not None else {}
    values = {name: p.detach() for name, p in model.named_parameters()}
    values |= {name: run_weight_graph(graph, tensors.__getitem__) for name, graph in graphs.items()}
    return values
