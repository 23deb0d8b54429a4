"""How a run ends before its end: it is saved, and an error says where."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import TrainingError
from ..io.atomic import DiskFailed
from ..net.subnet_model import SubnetModel
from .checkpoints import is_needed, run_state, save
from .interrupt import Stopped
from .metrics import NothingScored
from .session import Session
from .state.store import FolderStore, MemoryStore
from .user_code import CallbackFailed, LoaderFailed

__all__ = ["ending", "rescued_bundle", "saved_run"]

log = logging.getLogger(__name__)


@contextmanager
def ending(session: Session, configuration: Mapping[str, Any]) -> Iterator[None]:
    """Save where the run was asked to stop, or a loader, a metric, the model or a callback raised; then end it.

    Args:
        session: The run.
        configuration: Of the run.

    Raises:
        TrainingError: A loader or other code of the user's raised, or the disk failed; says where the run was saved.
        KeyboardInterrupt, SystemExit: The run was asked to stop.
    """
    try:
        yield
    except Stopped:
        save(session, interrupted=True)
        raise session.interrupts.error() from None
    except (LoaderFailed, NothingScored) as failed:
        if session.ranks.world > 1:  # saving takes all of them, and the others' loaders did not fail
            raise TrainingError(str(failed)) from failed.__cause__
        raise TrainingError(f"{str(failed).rstrip('?')}. {saved_run(session, configuration)}") from failed.__cause__
    except CallbackFailed as failed:
        error = failed.__cause__
        assert error is not None
        if session.ranks.world == 1:
            error.add_note(saved_run(session, configuration, call_callbacks=False))
        raise error from error.__cause__
    except DiskFailed as error:
        trained = session.position.phase in ("refit", "finish", "done")
        if not trained or session.ranks.world > 1 or (where := rescued_bundle(session.net)) is None:
            raise
        raise TrainingError(f"{error} {where}") from error.__cause__


def saved_run(session: Session, configuration: Mapping[str, Any], *, call_callbacks: bool = True) -> str:
    """Save a run that failed: in its folder, or without one in a new temporary folder.

    Args:
        session: The run, at a moment from which it can be resumed.
        configuration: Of the run.
        call_callbacks: Whether callbacks learn of it.

    Returns:
        Where it is and how to resume it, or why it could not be saved.
    """
    try:
        path = save(session, interrupted=True, call_callbacks=call_callbacks)
    except DiskFailed as error:
        return f"The run could not be saved: {error} {rescued_bundle(session.net) or ''}".rstrip()
    except TrainingError as error:
        return f"The run could not be saved: {error}"
    if path is not None:
        return f"The run was saved in {path}: the same call resumes from there"
    return _rescued_run(session, configuration) or session.store.standing


def _rescued_run(session: Session, configuration: Mapping[str, Any]) -> str | None:
    """Write the state of a run without ``out_dir`` to a new temporary folder.

    Returns:
        What to type to resume the run; ``None`` where nothing was trained, or it cannot be written.
    """
    store = session.store
    if not isinstance(store, MemoryStore) or not session.history.steps:
        return None

    def write(folder: Path) -> None:
        written = FolderStore(folder / "state", configuration)
        for name, tensors in store.items():
            written.put(name, tensors)
        written.save(lambda: run_state(session), lambda file: is_needed(session, file))

    folder = _written_to_temporary(write)
    if folder is None:
        return None
    return f"The run was saved in {folder}: the same call with out_dir={str(folder)!r} resumes from there"


def rescued_bundle(net: SubnetModel, hint: str = "") -> str | None:
    """Save a net's weights and masks to a new temporary folder.

    Args:
        net: The networks.
        hint: What else may be typed.

    Returns:
        Where they are and what to type; ``None`` where they cannot be written.
    """
    folder = _written_to_temporary(lambda folder: net.save_pretrained(folder / "bundle"))
    if folder is None:
        return None
    return (
        f"The trained weights and masks are in the net, and saved in {folder / 'bundle'}: {hint}"
        f"cocktailsdk.from_pretrained({str(folder / 'bundle')!r}, model)"
    )


def _written_to_temporary(write: Callable[[Path], Any]) -> Path | None:
    """Call a function with a new temporary folder; ``None`` where it raises, which is logged."""
    try:
        folder = Path(tempfile.mkdtemp(prefix="cocktail-rescued-"))
        write(folder)
    except Exception as error:  # one failure is being told of already
        log.warning("what was trained could not be saved to a temporary folder: %s", error)
        return None
    return folder
