"""One run at a time in a folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ...errors import TrainingError

try:
    import fcntl
except ImportError:  # Windows has none
    fcntl = None  # type: ignore[assignment]

__all__ = ["locked"]

_MINE: set[Path] = set()  # a process's locks do not keep out itself


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock, which the system releases with the process, however it ends.

    It is a record lock: processes that this one forks, such as a loader's workers, which may outlive it for a while, do
    not hold it. Where the system or the file system knows no locks, only this process is kept out.

    Args:
        path: An empty file, made where it does not exist and left there. Where it cannot be made, nothing can be
            written beside it either, and no lock is needed.

    Raises:
        TrainingError: Where another process, or another trainer in this one, holds it.
    """
    path = path.resolve()
    taken = TrainingError(
        f"another run is training in {path.parent}: wait for it or stop it, or train into another folder"
    )
    if path in _MINE:
        raise taken
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError:
        yield
        return
    _MINE.add(path)
    try:
        if fcntl is not None:
            try:
                fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                raise taken from None
            except OSError:  # some network file systems
                pass
        yield
    finally:
        _MINE.discard(path)
        os.close(handle)
