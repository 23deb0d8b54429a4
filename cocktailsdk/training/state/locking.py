"""One run at a time in a folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from ...errors import TrainingError

__all__ = ["locked"]


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock, which the system releases with the process, however the process ends.

    filelock closes the lock's descriptor in forked processes (3.30 and later), so that a loader's workers, which may
    outlive this process for a while, do not hold the lock.

    Args:
        path: An empty file, made if it does not exist and not removed.

    Raises:
        TrainingError: Another process, or another trainer in this one, holds the lock, or the path is no file.
    """
    if path.exists() and not path.is_file():
        raise TrainingError(f"{path} is not a file, so no run can be locked with it: remove it, or train elsewhere")
    # No fallback_to_soft: a soft lock is a file whose existence is the lock, which a killed process would leave.
    # thread_local=False: a generator may be closed in another thread than the one that took the lock.
    lock = FileLock(path.resolve(), blocking=False, thread_local=False, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout:
        raise TrainingError(
            f"another run is training in {path.resolve().parent}: wait for it or stop it, or train into another folder"
        ) from None
    except (OSError, NotImplementedError):
        # Where the file cannot be made, nothing can be written beside it either, and no lock is needed. Some network
        # file systems know no locks.
        pass
    try:
        yield
    finally:
        lock.release()
