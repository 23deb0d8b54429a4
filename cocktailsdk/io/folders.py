"""Folders that are there as a whole or not at all, whatever becomes of the process or the machine.

A folder is made beside its place, flushed to the disk, and put there in one step: renamed where there was none,
exchanged with the one that was there. Where the system or the file system cannot exchange two folders, two renames do
it; a process that dies between them leaves the old folder under a name by which it is still found, and put back the
next time.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from . import usual_folder

try:
    import fcntl
except ImportError:  # Windows has none
    fcntl = None  # type: ignore[assignment]

__all__ = ["Replaced", "flush", "found", "new_folder", "steady"]

T = TypeVar("T")

_CANNOT = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM}
_TRIES = 200
_WAIT = 0.005  # seconds, where a folder is not there while somebody replaces it


class Replaced(Exception):
    """A folder was replaced again and again while it was read."""


def found(target: Path) -> Path:
    """Where a folder is: at its place, or beside it where a process died while replacing it, or is about to end."""
    beside = _aside(target)
    return beside if not target.exists() and beside.is_dir() else target


def steady(target: Path, look: Callable[[Path, int | None], T]) -> T:
    """Look into a folder that another process may be replacing: at the old one or at the new one, never at both.

    Where the system knows handles of folders, what is opened by one is of one folder, whatever is put in its place.
    Elsewhere it is compared whether the same folder was there before and after.

    Args:
        target: The folder.
        look: Called with where it is and its handle, more than once where the folder is replaced meanwhile.

    Returns:
        What ``look`` returned.

    Raises:
        FileNotFoundError: The folder, or what ``look`` wants of it, is not there.
        Replaced: It was replaced too often.
    """
    for _ in range(_TRIES):
        folder = found(target)
        try:
            handle = _folder_handle(folder)
        except FileNotFoundError:
            if not _in_progress(target):
                raise
            time.sleep(_WAIT)
            continue
        try:
            before = _identity(folder if handle is None else handle)
            try:
                seen = look(folder, handle)
            except FileNotFoundError:
                if before is not None and _identity(found(target)) == before:
                    raise
                continue
            if handle is not None or (before is not None and _identity(folder) == before):
                return seen
        finally:
            if handle is not None:
                os.close(handle)
    raise Replaced(f"{target} was replaced {_TRIES} times while it was read")


def _folder_handle(folder: Path) -> int | None:
    if os.open not in os.supports_dir_fd or os.stat not in os.supports_dir_fd:
        if not folder.is_dir():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(folder))
        return None
    return os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)


def _identity(folder: Path | int) -> tuple[int, int, int] | None:
    try:
        seen = os.stat(folder)
    except OSError:
        return None
    return seen.st_dev, seen.st_ino, seen.st_mtime_ns  # a new folder may get the number of one that is gone


def _in_progress(target: Path) -> bool:
    """Whether a folder is being replaced, or has come back since."""
    try:
        return target.exists() or any(p.name.startswith(_prefix(target)) for p in target.parent.iterdir())
    except OSError:
        return False


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """An empty folder to write to, which takes the place of ``target`` at the end, unless something is raised.

    What ``target`` held and the new folder does not is kept, as files of the new folder. What processes that were
    killed left beside it is removed first.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    _tidy(target)
    made, mode = usual_folder(target.parent, _prefix(target))
    with _held(made):
        try:
            yield made
            if target.exists():
                _keep_others(target, made)
            flush(made)
            made.chmod(mode)
            _put(made, target)
        finally:
            shutil.rmtree(made, ignore_errors=True)


def flush(path: Path) -> None:
    """Have a file or a folder on the disk, not only in memory."""
    if path.is_dir():
        if os.name == "nt":  # folders cannot be opened there
            return
        handle = os.open(path, os.O_RDONLY)
    else:
        handle = os.open(path, os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _prefix(target: Path) -> str:
    return f".{target.name}.new-"


def _aside(target: Path) -> Path:
    return target.with_name(f".{target.name}.old")


def _put(made: Path, target: Path) -> None:
    if not target.exists():
        made.rename(target)
    elif not _exchange(made, target):
        target.rename(_aside(target))
        try:
            made.rename(target)
        except BaseException:
            _aside(target).rename(target)
            raise
        flush(target.parent)
        shutil.rmtree(_aside(target), ignore_errors=True)
    flush(target.parent)


def _keep_others(old: Path, new: Path) -> None:
    """Have in the new folder what only the old one holds: by links where there can be, so that nothing is moved."""
    for entry in old.iterdir():
        into = new / entry.name
        if into.exists():
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.copytree(entry, into, symlinks=True, copy_function=_link)
        else:
            _link(entry, into)


def _link(old: str | Path, new: str | Path) -> None:
    try:
        os.link(old, new, follow_symlinks=False)
    except (OSError, NotImplementedError):
        shutil.copy2(old, new, follow_symlinks=False)


def _exchange(a: Path, b: Path) -> bool:
    """Exchange two folders in one step; ``False`` where that cannot be done here."""
    call = _exchange_call()
    if call is None:
        return False
    if call(os.fsencode(a), os.fsencode(b)) == 0:
        return True
    code = ctypes.get_errno()
    if code in _CANNOT:
        return False
    raise OSError(code, os.strerror(code), str(b))


def _exchange_call() -> Callable[[bytes, bytes], int] | None:
    if sys.platform.startswith("linux"):
        rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)  # not in old C libraries
        here = -100  # AT_FDCWD
        return None if rename is None else lambda a, b: int(rename(here, a, here, b, 2))  # RENAME_EXCHANGE
    if sys.platform == "darwin":
        rename = getattr(ctypes.CDLL(None, use_errno=True), "renamex_np", None)
        return None if rename is None else lambda a, b: int(rename(a, b, 2))  # RENAME_SWAP
    return None


def _tidy(target: Path) -> None:
    """Put back or remove what processes left that died while writing here; those of living ones stay."""
    beside = _aside(target)
    if beside.is_dir():
        if target.exists():
            shutil.rmtree(beside, ignore_errors=True)
        else:
            beside.rename(target)
    for path in target.parent.iterdir():
        if path.name.startswith(_prefix(target)) and path.is_dir() and not path.is_symlink():
            with contextlib.suppress(OSError), _held(path):
                shutil.rmtree(path, ignore_errors=True)


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Hold a folder's lock, which the system releases with the process.

    Raises:
        BlockingIOError: Another process holds it.
    """
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError:  # some network file systems know no locks
            pass
        yield
    finally:
        os.close(handle)
