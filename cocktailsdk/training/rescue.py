"""Work saved where it would be lost: something failed after training."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import TrainingError
from ..io.atomic import DiskFailed
from .state.store import FolderStore, MemoryStore

if TYPE_CHECKING:
    from ..net.subnet_model import SubnetModel
    from .session import Session

__all__ = ["rescued_bundle", "saved_run"]

log = logging.getLogger(__name__)


def saved_run(session: Session, configuration: Mapping[str, Any], *, tell: bool = True) -> str:
    """Save a run that failed: in its folder, or without one in a new temporary folder.

    Args:
        session: The run, at a moment from which it can be resumed.
        configuration: Of the run.
        tell: Whether to tell the callbacks.

    Returns:
        Where it is and how to resume it, or why it could not be saved.
    """
    try:
        path = session.save(interrupted=True, tell=tell)
    except DiskFailed as error:
        return f"The run could not be saved: {error} {rescued_bundle(session.net) or ''}".rstrip()
    except TrainingError as error:
        return f"The run could not be saved: {error}"
    if path is not None:
        return f"The run was saved in {path}: the same call goes on from there"
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
        written.save(session.state, session.needs)

    folder = _written(write)
    if folder is None:
        return None
    return f"The run was saved in {folder}: the same call with out_dir={str(folder)!r} goes on from there"


def rescued_bundle(net: SubnetModel, hint: str = "") -> str | None:
    """Save a net's weights and masks to a new temporary folder.

    Args:
        net: The networks.
        hint: What else may be typed.

    Returns:
        Where they are and what to type; ``None`` where they cannot be written.
    """
    folder = _written(lambda folder: net.save_pretrained(folder / "bundle"))
    if folder is None:
        return None
    return (
        f"The trained weights and masks are in the net, and saved in {folder / 'bundle'}: {hint}"
        f"cocktailsdk.from_pretrained({str(folder / 'bundle')!r}, model)"
    )


def _written(write: Callable[[Path], Any]) -> Path | None:
    try:
        folder = Path(tempfile.mkdtemp(prefix="cocktail-rescued-"))
        write(folder)
    except Exception as error:  # one failure is being told of already
        log.warning("what was trained could not be saved to a temporary folder: %s", error)
        return None
    return folder
