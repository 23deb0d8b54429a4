"""Opening files that anybody may have put there: a FIFO in the place of a file must not make a reader wait forever."""

from __future__ import annotations

import errno
import os
import stat
from io import BufferedReader
from pathlib import Path

__all__ = ["check_regular", "open_regular"]

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
