"""Files that anybody may have put there, opened safely, and files of our own, with the mode that they should have.

A FIFO in the place of a file must not make a reader wait forever.

New files and folders get the mode that the umask (or the folder's access control list) asks for. Libraries that write
to a temporary file and rename it (safetensors), and ``tempfile.mkdtemp``, give them to their owner alone. The umask is
never asked for, since that means to change it for a moment, for all threads: a file or folder is made the usual way,
and its mode is looked at.
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path

__all__ = ["check_regular", "file_mode", "open_regular", "usual_folder", "usual_mode"]

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)
# A FIFO that is put there between the look and the opening is opened without waiting for somebody to write to it.
_FLAGS = os.O_RDONLY | sum(getattr(os, name, 0) for name in ("O_NONBLOCK", "O_CLOEXEC", "O_NOCTTY", "O_BINARY"))


def open_regular(path: Path | str, folder: int | None = None) -> BufferedReader:
    """Open a regular file, or a link to one, for reading.

    Args:
        path: The file.
        folder: A handle of the folder that a relative path is in; not on all systems (``os.supports_dir_fd``).

    Raises:
        OSError: It is not there, cannot be read, or is a folder, a FIFO, a socket or a device.
    """
    check_regular(os.stat(path, dir_fd=folder).st_mode, path)  # opening a device may have effects
    handle = os.open(path, _FLAGS, dir_fd=folder)
    try:
        check_regular(os.fstat(handle).st_mode, path)
        return os.fdopen(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def check_regular(mode: int, path: Path | str) -> None:
    """See that something is a regular file.

    Raises:
        OSError: It is something else; says what.
    """
    if not stat.S_ISREG(mode):
        kind = next((name for test, name in _KINDS if test(mode)), "something else")
        raise OSError(errno.EINVAL, f"it is {kind}, not a file", str(path))


def file_mode(folder: Path) -> int:
    """The mode that a new file gets in a folder."""
    probe = folder / f".{secrets.token_hex(4)}.tmp"
    with probe.open("xb") as file:
        mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
    probe.unlink()
    return mode


@contextmanager
def usual_mode(*paths: Path) -> Iterator[None]:
    """Give files that another library writes inside the mode that ``open`` would have given them.

    Args:
        *paths: The files. They are made, or emptied, first.
    """
    modes = []
    for path in paths:
        with path.open("wb") as file:
            modes.append(stat.S_IMODE(os.fstat(file.fileno()).st_mode))
    yield
    for path, mode in zip(paths, modes, strict=True):
        path.chmod(mode)


def usual_folder(parent: Path, prefix: str) -> tuple[Path, int]:
    """A new, empty folder of a name that nobody else has.

    Returns:
        The folder, and the mode that it should have in the end: until then its owner may write to it.
    """
    while True:
        path = parent / f"{prefix}{secrets.token_hex(4)}"
        try:
            path.mkdir()
        except FileExistsError:
            continue
        mode = stat.S_IMODE(path.stat().st_mode)
        path.chmod(mode | stat.S_IRWXU)
        return path, mode
