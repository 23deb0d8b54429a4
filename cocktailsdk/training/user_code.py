"""Calls into the user's code: callbacks, loaders, models and metrics. What they raise must not lose the run.

All of it is called where the run can be resumed: a Ctrl-C there saves, then stops the run, and an error is raised as
one that says where the run was saved.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from ..errors import CocktailError, TrainingError
from ..patterns.base import DENSE
from ..utils.nested import to_device
from .events import Callback, Event
from .interrupt import Stopped
from .metrics import NothingScored
from .session import Session

__all__ = ["CallbackFailed", "LoaderFailed", "emit", "guarded", "guarded_batches", "next_batches", "stop_if_asked"]


class LoaderFailed(Exception):
    """A loader or other code of the user's raised, where the run can be resumed; it is the cause."""


class CallbackFailed(Exception):
    """A callback raised, where the run can be resumed; its error is the cause."""


def emit(session: Session, event: Event) -> None:
    """Call the callbacks; of several processes the main one does, and all stop where one was interrupted.

    Raises:
        CallbackFailed: A callback raised, or left a subnetwork active.
        Stopped: The run was asked to stop.
    """
    stop = False
    try:
        for callback in session.options.callbacks if session.ranks.is_main else ():
            _call(session, callback, event)
    except KeyboardInterrupt:
        if session.interrupts.again:
            raise
        stop = True
    if session.ranks.any(stop or session.interrupts.requested):
        raise Stopped


def _call(session: Session, callback: Callback, event: Event) -> None:
    net, active = session.net, DENSE
    try:
        callback(event)
    except Exception as error:
        raise CallbackFailed from error
    finally:
        if net.active != DENSE:  # training continues in the dense weights, whatever the callback raised
            active = net.active
            net.switch(DENSE)
    if active != DENSE:
        raise CallbackFailed from TrainingError(
            f"a callback left {active!r} active after {type(event).__name__}, and training would go on in it: use "
            f"it within `with net.using({active!r}):`"
        )


def stop_if_asked(session: Session) -> None:
    """End the run here if it was asked to stop. Several processes stop together, at events.

    Raises:
        Stopped: The run was asked to stop.
    """
    if session.ranks.world == 1 and session.interrupts.requested:
        raise Stopped


def next_batches(session: Session) -> tuple[list[Any], int]:
    """The next step's training batches, on the device, and the index of the first in its pass over the loader.

    Raises:
        Stopped, LoaderFailed: As of :func:`guarded_batches`.
        TrainingError: The loader gives no batches.
    """
    at = session.position

    def name() -> str:
        return f"train_loader, in round {at.round}, epoch {at.epoch},"

    place = at.round, at.epoch, at.step
    batches, first = session.data.stream.draw(place, lambda drawn: guarded_batches(session, drawn, name))
    return to_device(batches, session.device), first


def guarded_batches(session: Session, batches: Iterable[Any], name: str | Callable[[], str]) -> Iterator[Any]:
    """Batches of a loader, until the run is asked to stop.

    Only to be used where the run can be resumed from between two batches.

    Args:
        session: Of the run.
        batches: From a loader.
        name: What they are called in errors; or a function that says so.

    Raises:
        Stopped: The run was asked to stop; also where a loader breaks because the same Ctrl-C ended its workers.
        LoaderFailed: The loader raised.
    """
    iterator = iter(batches)
    i = 0
    try:
        while True:
            stop_if_asked(session)
            try:
                batch = next(iterator)
            except StopIteration:
                return
            except Exception as error:
                stop_if_asked(session)
                of = name if isinstance(name, str) else name()
                reason = " ".join(str(error).split())
                raise LoaderFailed(f"{of} raised {type(error).__name__} ({reason}) for batch {i}, from 0") from error
            yield batch
            i += 1
    finally:
        if isinstance(iterator, Generator):  # closing it puts the loader's generators back
            iterator.close()


@contextmanager
def guarded(work: str) -> Iterator[None]:
    """Work on trained weights, whose failure must not lose them. Only to be used where the run can be resumed.

    Args:
        work: What is done, for errors.

    Raises:
        LoaderFailed: Something raised.
    """
    try:
        yield
    except (Stopped, LoaderFailed, NothingScored):
        raise
    except Exception as error:
        reason = error if isinstance(error, CocktailError) else f"{type(error).__name__}: {error}"
        raise LoaderFailed(f"{work} failed ({' '.join(str(reason).split())})") from error
