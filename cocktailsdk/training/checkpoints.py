"""Saving a run, but never numbers that are not finite, and restoring it: its state as tensors and plain values."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path
from typing import Any

from ..errors import TrainingError
from ..masks import Mask
from ..utils.nested import to_device
from .events import Saved, StepSkipped
from .head_fit import Head
from .left_out import first_few
from .metrics import Score
from .session import Session, load_tensors, model_tensors
from .state.compatibility import hook_states
from .state.encoding import decode_masks, encode_masks, plain, written_before
from .state.history import History, Position
from .step.nan_guard import not_finite
from .step.same_batch import SameBatch
from .user_code import emit

__all__ = [
    "check_finite",
    "emit_skipped",
    "is_needed",
    "nonfinite_error",
    "restore",
    "run_state",
    "save",
    "save_if_due",
    "save_if_late",
]

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
        raise nonfinite_error(
            session,
            f"{first_few(names)} became infinite or no number by round {at.round}, epoch {at.epoch}, step "
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


def is_needed(session: Session, file: str) -> bool:
    """Whether a file that was put into the store will be read again."""
    return (
        session.position.phase in ("train", "merge", "refit")
        or not file.startswith(("round-", "rewind"))
        or file in session.history.weights.values()
    )


def run_state(session: Session) -> dict[str, Any]:
    """The run as it stands. The keys are a file format: :mod:`.state.compatibility` checks them."""
    net, data, merging = session.net, session.data, session.merging
    measured = session.position.phase in ("refit", "finish", "done")
    tracked = session.options.recipe.statistics == "separate"
    # a run that is resumed within a round may stop again before the round's optimizer is built
    optimization = session.resumed if session.optimization is None else session.optimization.state_dict()
    return {
        "position": asdict(session.position),
        "history": session.history.to_dict(),
        "classes": None if session.classes is None else asdict(session.classes),
        "first_generators": data.first_generators,
        "generators": data.stream.generators,
        "stream": data.stream.state_dict(),
        "losses": session.losses,
        "judged": [
            [alpha, *cell, str(score.value), None if score.maximum is None else str(score.maximum)]
            for (alpha, cell), score in merging.scores.items()
        ],
        "held_examples": merging.order,
        "held_scores": merging.score_count,
        "masks": encode_masks(net, {name: net.masks[name] for name in sorted(session.remade)}),
        "hooks": plain(session.hooks.state_dict()),
        "rewound": session.rewound,
        "model": model_tensors(net.model),
        "average": None if session.average is None else session.average.state_dict(),
        "optimization": plain(optimization),
        "statistics": {k: dict(v) for k, v in net.statistics.items()} if measured or tracked else {},
        "private": {k: dict(v) for k, v in net.private.items()} if measured else {},
        "metrics": dict(net.metrics) if measured else {},
        "heads": {name: None if head is None else asdict(head) for name, head in session.heads.items()},
        "owed": {} if session.shares is None else dict(session.shares.owed),
        "skipped_in_a_row": 0 if session.skips is None else session.skips.in_a_row,
    }


def restore(session: Session, state: Mapping[str, Any]) -> None:
    """Continue from a saved state, which :func:`~.state.compatibility.check_state` has checked.

    The optimizer is not built here: every round builds its own.
    """
    net, data, merging, device = session.net, session.data, session.merging, session.device
    # the position comes first: where the stream of an old state is depends on it
    session.position = Position(**state["position"])
    session.history = History.from_dict(state["history"])
    data.stream.generators = state["generators"]
    data.stream.load_state_dict(state.get("stream") or _old_stream(session))
    session.losses = {k: v.to(device) for k, v in state["losses"].items()}
    merging.scores = {
        (alpha, (name, part)): Score(Fraction(value), None if maximum is None else Fraction(maximum))
        for alpha, name, part, value, maximum in state["judged"]
    }
    merging.order, merging.score_count = state["held_examples"], state["held_scores"]
    session.rewound, session.resumed = state["rewound"], state["optimization"]
    load_tensors(net.model, state["model"])
    if session.average is not None:
        session.average.load_state_dict(state["average"])
    # masks of all rounds that have begun, then those that were made anew since: a later one replaces an earlier one
    begun = session.position.round + (session.position.entered or session.position.phase != "train")
    masks = _stored_masks(session, min(begun, session.options.finishing_round))
    remade = decode_masks(state["masks"], net)
    for name, mask in {**masks, **remade}.items():
        net.set_mask(name, mask)
    session.remade |= remade.keys()
    for name, head in to_device(state.get("heads", {}), device).items():
        session.heads[name] = None if head is None else Head(**head)
    if session.shares is not None:
        session.shares.update(session.history.measured)
        session.shares.owed.update(state["owed"])
    session.hooks.load_state_dict(to_device(hook_states(state, session.hooks), device))
    # after the masks, since setting a mask drops the network's statistics
    net.statistics.update({n: {k: v.to(device) for k, v in s.items()} for n, s in state["statistics"].items()})
    for name, own in state.get("private", {}).items():
        net.set_private(name, to_device(own, device))
    net.metrics.update(state["metrics"])
    if session.skips is not None:
        session.skips.in_a_row = state.get("skipped_in_a_row", 0)


def _stored_masks(session: Session, end: int) -> dict[str, Mask]:
    """The masks made in the rounds before one; files of older releases are written anew."""
    masks: dict[str, Mask] = {}
    for file in (f"masks-{k:02d}" for k in range(1, end)):
        tensors = session.store.get(file)
        made = decode_masks(tensors, session.net, masks)
        if written_before(tensors):
            session.store.put(file, encode_masks(session.net, made, masks))
        masks |= made
    return masks


def _old_stream(session: Session) -> dict[str, Any]:
    """Where the stream is in a state of release 0.1.0, in which every epoch began a pass of its own."""
    at, options = session.position, session.options
    passes = (at.round - options.first_round) * options.epochs + at.epoch
    if not (at.entered and at.step):
        return {"begun": None, "drawn": 0, "passes": passes}
    first = (at.epoch - options.epochs_of(at.round).start) * options.steps_per_epoch
    drawn, shared = 0, SameBatch(options.recipe.same_batch)
    for i in range(at.step):
        step = session.step_at(at.round, first + i)
        drawn += not shared.follows(step)
        shared.done(step, None)
    return {"begun": (at.round, at.epoch, 0), "drawn": drawn, "passes": passes + 1}
