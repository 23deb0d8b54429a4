"""The score of a run, judged whenever it makes masks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from ..calibration import CalibrationData
from ..calibration.provenance import note_scores
from ..patterns.scoring import PatternScores
from ..utils.undo import forked
from .distributed.sharing import examples
from .scoring import EXAMPLES
from .session import Session
from .user_code import guarded_batches, stop_if_asked

__all__ = ["note_run_scores", "scores_now"]


def scores_now(session: Session) -> PatternScores | None:
    """How patterns rank the weights as they are; ``None`` where all rank by magnitude.

    To be called where the run can be resumed. Nothing is drawn from the random numbers of training.

    Raises:
        PatternError: The score cannot be judged, as of :func:`~cocktailsdk.calibration.calibrate`.
        Stopped, LoaderFailed: As of :func:`~cocktailsdk.training.user_code.guarded_batches`.
    """
    scoring = session.options.scoring
    if scoring is None:
        return None

    def forward(model: nn.Module, batch: Any) -> tuple[Any, Any]:
        stop_if_asked(session)
        return session.options.forward_fn(model, batch)

    return scoring.calibrate(session.net, _data(session), forward)


def note_run_scores(session: Session) -> None:
    """Write the run's scores into the net's provenance, and remove what was noted of masks before the run."""
    scoring = session.options.scoring
    if scoring is None:
        note_scores(session.net, {}, None)
    else:
        note_scores(session.net, scoring.by_pattern, _data(session))


def _data(session: Session) -> CalibrationData | None:
    """What scores are judged from: as given, or the first training batches with enough examples."""
    scoring, data = session.options.scoring, session.data
    assert scoring is not None
    if scoring.data is not None or not scoring.needs_data:
        return scoring.data
    if data.calibration_data is None:
        data.stream.close()  # the loader may not be iterable twice at once; the stream finds its place again
        with forked():
            data.calibration_data = CalibrationData.of(_first_batches(session))
    return data.calibration_data


def _first_batches(session: Session) -> Iterator[Any]:
    left = EXAMPLES
    batches = guarded_batches(session, session.data.calibration, "train_loader")
    try:
        for batch in batches:
            yield batch
            left -= max(examples(batch), 1)
            if left <= 0:
                return
    finally:
        batches.close()  # type: ignore[attr-defined]  # which puts the loader's generators back
