"""Work saved where it would be lost: something failed after training, and nowhere to save to was given."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .state import FolderStore, MemoryStore

if TYPE_CHECKING:
    from ..net import CocktailNet
    from .session import Session

__all__ = ["rescued_bundle", "rescued_run"]

log = logging.getLogger(__name__)


def rescued_run(session: Session, configuration: Mapping[str, Any]) -> str | None:
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


def rescued_bundle(net: CocktailNet) -> str | None:
    """Save a net's weights and masks to a new temporary folder.

    Returns:
        Where they are and what to type; ``None`` where they cannot be written.
    """
    folder = _written(lambda folder: net.save_pretrained(folder / "bundle"))
    if folder is None:
        return None
    return (
        f"The trained weights and masks are in the net, and saved in {folder / 'bundle'}: call finish() again, or "
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
