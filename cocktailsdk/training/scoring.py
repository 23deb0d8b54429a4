"""What the masks of a run rank by: the score that the user chose, judged anew whenever masks are made."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ..calibration import CalibrationData, calibrate
from ..errors import PatternError, TrainingError
from ..net.subnet_model import SubnetModel, model_unchanged
from ..patterns.scores import Score
from ..patterns.scoring import (
    PatternScores,
    ScoreFunction,
    ScoreLike,
    described_scores,
    needs_data,
    resolve_scores,
    sharded_error,
)
from ..utils.devices import device_of
from ..utils.fsdp import sharded
from ..utils.losses import ForwardFn, LossFn
from ..utils.score_text import score_text
from ..utils.undo import forked
from .data.loader_state import generator_states, refuse_spent, set_generator_states
from .randomness import seed_everything
from .recipes import Recipe
from .step.execution import without_autocast

__all__ = ["EXAMPLES", "RunScoring", "warn_of_other_scores"]

log = logging.getLogger(__name__)

EXAMPLES = 128
"""Training examples that scores are judged from if no calibration data is given; as many as Wanda and SparseGPT use."""


@dataclass(frozen=True)
class RunScoring:
    """How a run ranks, where not all by magnitude.

    Attributes:
        by_pattern: The score of each pattern, by its name.
        data: The calibration data that the user gave.
        loss_fn: The run's.
        forward_fn: The run's; ``None`` for the default.
    """

    by_pattern: Mapping[str, Score | ScoreFunction]
    data: CalibrationData | None
    loss_fn: LossFn | None
    forward_fn: ForwardFn | None

    @classmethod
    def of(
        cls,
        net: SubnetModel,
        recipe: Recipe,
        score: ScoreLike | Mapping[str, ScoreLike],
        calibration: Iterable[Any] | CalibrationData | None,
        loss_fn: LossFn | None,
        forward_fn: ForwardFn | None,
        seed: int,
    ) -> RunScoring | None:
        """The scores of a run, checked; ``None`` where all patterns rank by magnitude.

        Calibration data is read here, in the order that the seed gives; global generators stay as they were.

        Raises:
            PatternError: A score is unknown, or not defined for its pattern; the model is sharded, and a score is not
                magnitude; or the calibration data is no loader or empty.
            TrainingError: The recipe ranks channels itself, or the calibration data can be read only once.
        """
        resolved = resolve_scores(score, net.patterns)
        if not described_scores(resolved):
            return None
        if sharded(net.model):
            raise sharded_error(resolved)
        channel = resolved.get("channel")
        if recipe.masks == "refilling" and isinstance(channel, Score) and not channel.scores_elements():
            raise TrainingError(
                f"recipe {recipe.name!r} ranks channels by the weights that survive in the unstructured mask, not by "
                f"{channel.name!r}: leave score['channel'] out, or choose another recipe"
            )
        data = None
        if calibration is not None and needs_data(resolved):
            data = calibration if isinstance(calibration, CalibrationData) else _read(calibration, seed)
        return cls(resolved, data, loss_fn, forward_fn)

    @property
    def needs_data(self) -> bool:
        """Whether a score is judged from data."""
        return needs_data(self.by_pattern)

    def describe(self) -> dict[str, Any]:
        """The part of a run's configuration that it is: scores by pattern, and what calibration data was given."""
        out: dict[str, Any] = {"score": described_scores(self.by_pattern)}
        if self.data is not None:
            out["calibration"] = {"fingerprint": self.data.fingerprint, "examples": self.data.examples}
        return out

    def require_data(self, caller: str) -> None:
        """See that the user gave data, where a score needs any and the caller has none.

        Raises:
            PatternError: There is none.
        """
        if self.needs_data and self.data is None:
            names = ", ".join(repr(text) for text in dict.fromkeys(described_scores(self.by_pattern).values()))
            raise PatternError(f"score {names} is judged from data: give {caller} calibration=loader")

    def calibrate(
        self, net: SubnetModel, data: CalibrationData | None = None, forward_fn: ForwardFn | None = None
    ) -> PatternScores:
        """Judge the weights as they are. The model, its modes and global generators are left as they were.

        Args:
            net: The dense network is active.
            data: Where a score needs any. Default: what the user gave.
            forward_fn: Instead of the run's own.

        Raises:
            PatternError: See :func:`~cocktailsdk.calibration.calibrate`.
        """
        with without_autocast(device_of(net.model)), model_unchanged(net):
            return calibrate(
                net.model,
                net.coupling,
                net.eligible,
                net.patterns,
                self.by_pattern,
                data or self.data,
                self.loss_fn,
                forward_fn or self.forward_fn,
            )


def _read(calibration: Iterable[Any], seed: int) -> CalibrationData:
    """All batches, in the same order whenever the run begins or resumes."""
    refuse_spent(calibration, "calibration")
    states = generator_states(calibration)
    with forked():
        seed_everything(seed, "calibration")
        try:
            return CalibrationData.of(calibration)
        finally:
            set_generator_states(calibration, states)


def warn_of_other_scores(net: SubnetModel, caller: str) -> None:
    """Say that the masks of a net, ranked by other scores, are made anew by magnitude."""
    if text := score_text(net.provenance.get("score")):
        log.warning(
            "the net's masks were ranked by %s, and %s makes them anew by magnitude: give %s(score=...) to keep that",
            text,
            caller,
            caller,
        )
