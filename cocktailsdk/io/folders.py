"""Write a folder completely or not at all, whatever happens to the process or the machine.

The new folder is made beside its place and flushed to the disk. Then one step puts it there: a rename if the place is
free, an exchange if an old folder is there. Where the system or the file system cannot exchange two folders, two
renames do it. A process that is killed between them leaves the old folder under a name by which :func:`locate` finds
it, and which the next write puts back.
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

from .atomic import fsync
from .files import file_mode, usual_folder

__all__ = ["Replaced", "locate", "move_files", "new_folder", "read_consistently"]

T = TypeVar("T")

_CANNOT_EXCHANGE = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM}  # an old kernel; the file system; a sandbox
_TRIES = 200
_WAIT = 0.005  # seconds, while another process is between the two renames that replace a folder


class Replaced(Exception):
    """A folder was replaced again and again while it was read."""


def locate(target: Path) -> Path:
    """The folder itself, or the old one beside it if a process is between the two renames or was killed there."""
    backup = _backup_of(target)
    return backup if not target.exists() and backup.is_dir() else target


def read_consistently(target: Path, read: Callable[[Path, int | None], T]) -> T:
    """Read a folder that another process may replace: all from the old one or all from the new one.

    Where the system has handles of folders, files opened by a handle belong to one folder, whatever takes its place.
    Elsewhere the folder's identity before and after is compared.

    Args:
        target: The folder.
        read: Called with the folder and its handle; called again if the folder was replaced meanwhile.

    Returns:
        The result of ``read``.

    Raises:
        FileNotFoundError: The folder, or a file in it that ``read`` opens, does not exist.
        Replaced: It was replaced too often.
    """
    for _ in range(_TRIES):
        folder = locate(target)
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
                result = read(folder, handle)
            except FileNotFoundError:
                # Between the two renames of a replacement, locate() finds this folder as the backup: read again.
                found = locate(target)
                if before is not None and found == folder and _identity(found) == before:
                    raise
                continue
            if handle is not None or (before is not None and _identity(folder) == before):
                return result
        finally:
            if handle is not None:
                os.close(handle)
    raise Replaced(f"{target} was replaced {_TRIES} times while it was read")


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """An empty folder to write to. It takes the place of ``target`` at the end, unless an exception is raised.

    Files of ``target`` that the new folder does not have are carried over. What killed processes left beside
    ``target`` is removed first.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    _clean_up(target)
    new, mode = usual_folder(target.parent, _prefix(target))
    with _locked(new):
        try:
            yield new
            if target.exists():
                _carry_over(target, new)
            # Before the folder gets its name: otherwise a power failure may leave the name with an empty folder.
            # The caller has flushed the files.
            fsync(new)
            new.chmod(mode)
            _install(new, target)
        finally:
            shutil.rmtree(new, ignore_errors=True)  # after an exchange, this is the old folder


def move_files(source: Path, target: Path) -> None:
    """Move all files of a folder beside a file, which is itself one of them and is moved last.

    So the file never exists without the ones that belong to it. Each file gets the mode that the umask asks for,
    whatever mode its writer gave it.
    """
    mode = file_mode(source)
    for file in sorted(source.iterdir(), key=lambda f: f.name == target.name):
        file.chmod(mode)
        fsync(file)  # before the rename, as in write_atomic
        file.replace(target.parent / file.name)
    fsync(target.parent)


def _folder_handle(folder: Path) -> int | None:
    if os.open not in os.supports_dir_fd or os.stat not in os.supports_dir_fd:
        if not folder.is_dir():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(folder))
        return None
    return os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)


def _identity(folder: Path | int) -> tuple[int, int, int] | None:
    try:
        status = os.stat(folder)
    except OSError:
        return None
    # The time too: a new folder may get the inode number of one that was removed.
    return status.st_dev, status.st_ino, status.st_mtime_ns


def _in_progress(target: Path) -> bool:
    """Whether a folder is being replaced, or has come back since."""
    try:
        return target.exists() or any(p.name.startswith(_prefix(target)) for p in target.parent.iterdir())
    except OSError:
        return False


def _prefix(target: Path) -> str:
    return f".{target.name}.new-"


def _backup_of(target: Path) -> Path:
    return target.with_name(f".{target.name}.old")


def _install(new: Path, target: Path) -> None:
    if not target.exists():
        new.rename(target)
    elif not _exchange(new, target):
        # Between these two renames only the backup exists; locate() finds it.
        target.rename(_backup_of(target))
        try:
            new.rename(target)
        except BaseException:
            _backup_of(target).rename(target)
            raise
        fsync(target.parent)  # both renames are on the disk before the old folder is removed from it
        shutil.rmtree(_backup_of(target), ignore_errors=True)
    fsync(target.parent)


def _carry_over(old: Path, new: Path) -> None:
    """Add what only the old folder has to the new one, by hard links where they work, so that nothing is copied."""
    for entry in old.iterdir():
        copy = new / entry.name
        if copy.exists():
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.copytree(entry, copy, symlinks=True, copy_function=_link)
        else:
            _link(entry, copy)


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
    if code in _CANNOT_EXCHANGE:
        return False
    raise OSError(code, os.strerror(code), str(b))


def _exchange_call() -> Callable[[bytes, bytes], int] | None:
    """The system's call that exchanges two paths, which Python does not offer: renameat2 on Linux, renamex_np on macOS.

    It leaves no time at which the folder does not exist, as two renames do.
    """
    if sys.platform.startswith("linux"):
        rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)  # glibc has it from 2.28 on
        here = -100  # AT_FDCWD: relative paths are relative to the current folder
        return None if rename is None else lambda a, b: int(rename(here, a, here, b, 2))  # RENAME_EXCHANGE
    if sys.platform == "darwin":
        rename = getattr(ctypes.CDLL(None, use_errno=True), "renamex_np", None)
        return None if rename is None else lambda a, b: int(rename(a, b, 2))  # RENAME_SWAP
    return None


def _clean_up(target: Path) -> None:
    """Put back or remove what processes left here that were killed; what living processes write stays."""
    backup = _backup_of(target)
    if backup.is_dir():
        if target.exists():
            shutil.rmtree(backup, ignore_errors=True)
        else:
            backup.rename(target)
    for path in target.parent.iterdir():
        if path.name.startswith(_prefix(target)) and path.is_dir() and not path.is_symlink():
            with contextlib.suppress(OSError), _locked(path):
                shutil.rmtree(path, ignore_errors=True)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Lock a folder itself, without a lock file; the system releases the lock with the process.

    Raises:
        BlockingIOError: Another process holds it.
    """
    if os.name == "nt":  # Windows opens no folders
        yield
        return
    from filelock import lock_descriptor  # late: reading a folder takes no lock

    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            free = lock_descriptor(handle, blocking=False)
        except OSError:  # some network file systems know no locks
            free = True
        if not free:
            raise BlockingIOError(errno.EWOULDBLOCK, "another process writes to it", str(folder))
        yield
    finally:
        os.close(handle)
