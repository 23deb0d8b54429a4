"""Modes of new files and folders: those that the umask (or the folder's access control list) asks for.

Libraries that write to a temporary file and rename it (safetensors), and ``tempfile.mkdtemp``, give them to their owner
alone. The umask is never asked for, since that means to change it for a moment, for all threads: a file or folder is
made the usual way, and its mode is looked at.
"""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["file_mode", "usual_folder", "usual_mode"]


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
