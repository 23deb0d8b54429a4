"""Saving a run, but never numbers that are not finite."""

from __future__ import annotations

import logging
from pathlib import Path

from ..errors import TrainingError
from .events import Saved, StepSkipped
from .run_state import is_needed, run_state
from .session import Session
from .step.nan_guard import not_finite
from .user_code import emit

__all__ = ["check_finite", "emit_skipped", "nonfinite_error", "save", "save_if_due", "save_if_late"]

log = logging.getLogger(__name__)


def save(session: Session, *, interrupted: bool = False, call_callbacks: bool = True) -> Path | None:
    """Write the run's state.

    Args:
        session: Of the run.
        interrupted: Whether the run ends here.
        call_callbacks: Whether callbacks learn of it.

    Returns:
        The file; ``None`` where the run has no folder.

    Raises:
        TrainingError: Losses or weights are not finite any more, or the disk fails. States saved before are left as
            they are.
    """
    check_finite(session)
    session.history.seconds += session.timing.lap()
    path = session.store.save(lambda: run_state(session), lambda file: is_needed(session, file))
    session.timing.saved()
    if path is None:
        return None
    event = Saved(path, interrupted)
    if not interrupted:
        emit(session, event)
        return path
    log.info("interrupted; the same call resumes from %s", path)
    # not by emit(), which would stop the run once more
    for callback in session.options.callbacks if session.ranks.is_main and call_callbacks else ():
        callback(event)
    return path


def save_if_due(session: Session) -> None:
    """Save at the end of an epoch or the like, where the last save is old enough."""
    if session.timing.save_due():
        save(session)


def save_if_late(session: Session) -> None:
    """Save in the middle of something, where the last save is too old."""
    if session.timing.save_late():
        save(session)


def check_finite(session: Session) -> None:
    """Check that everything that trains is finite.

    Raises:
        TrainingError: It is not.
    """
    if session.skips is None and (found := session.watch.look()) is not None:
        raise nonfinite_error(session, found)
    at = session.position
    if at.phase not in ("train", "finishing") or not at.entered:
        return
    names = not_finite(session.net.model)
    if session.ranks.any(bool(names)):
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise nonfinite_error(
            session,
            f"{', '.join(names[:3])}{more} became infinite or no number by round {at.round}, epoch {at.epoch}, step "
            f"{at.step} (all from 0; step {session.history.steps} of the run), though the losses were finite",
        )


def nonfinite_error(session: Session, found: str) -> TrainingError:
    """The error for numbers that are not finite any more."""
    skip = ', or leave such steps out (execution=ExecutionSettings(on_nan="skip"))' if session.skips is None else ""
    return TrainingError(
        f"{found}. Nothing was saved since. {session.store.standing} Lower the learning rate, or look for values in "
        f"the data that are not finite{skip}"
    )


def emit_skipped(session: Session) -> None:
    """Emit the steps that were left out since the last call, where the run can be resumed."""
    if session.skips is not None and session.skips.waiting:
        # emptied first: the callbacks may end the run, and those steps are not reported twice
        waiting, session.skips.waiting = session.skips.waiting, []
        for place, name, value in waiting:
            emit(session, StepSkipped(place.round, place.epoch, place.step, place.batch, name, value))
