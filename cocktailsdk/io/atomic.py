"""Write a file completely or not at all. Nothing here loads torch."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import TrainingError
from .files import open_regular

__all__ = ["DiskFailed", "HashingWriter", "Written", "fsync", "remove_stale", "sha256_of", "write_atomic", "write_json"]


@dataclass(frozen=True)
class Written:
    """A file that was written.

    Attributes:
        path: The file.
        sha256: Checksum of its content, without the header.
        bytes: Size of its content, without the header.
    """

    path: Path
    sha256: str
    bytes: int


class HashingWriter:
    """Writes to a file; counts and hashes the bytes.

    The first failure is stored in ``error`` and not raised: ``torch.save`` writes from C++, which does not survive an
    exception in ``write``. After a failure, bytes are only counted.

    Attributes:
        bytes: Number of bytes that :meth:`write` got so far.
        error: The first failure, if any.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._hash = file, hashlib.sha256()
        self.bytes = 0
        self.error: BaseException | None = None

    def write(self, data: Any) -> int:
        """Write any buffer."""
        size = memoryview(data).nbytes
        self.bytes += size
        if self.error is None:
            try:
                self._file.write(data)
                self._hash.update(data)
            except BaseException as error:  # a second Ctrl-C too
                self.error = error
        return size

    def flush(self) -> None:
        """Do nothing: :func:`write_atomic` flushes the file once, at its end."""

    @property
    def sha256(self) -> str:
        """Checksum of the bytes that were written so far."""
        return self._hash.hexdigest()


class DiskFailed(TrainingError):
    """A file cannot be written."""


def write_atomic(
    path: Path,
    data: bytes | str | Callable[[HashingWriter], None],
    *,
    header: Callable[[str], bytes] | None = None,
    name: Callable[[str], str] | None = None,
    check: Callable[[Path], None] | None = None,
    advice: str = "",
) -> Written:
    """Write a file so that after a crash the path holds all of the new content, or what it held before.

    Args:
        path: The file. Its mode is the one that the umask asks for.
        data: The content, text as UTF-8; or a function that writes the content in pieces.
        header: Makes a first part of fixed length from the content's checksum.
        name: Makes the file's name from the content's checksum; without it, the path's own name is used.
        check: Called with the temporary file before the rename; the write ends with any exception that it raises.
        advice: Ends the message of the error that a failing disk raises.

    Raises:
        DiskFailed: The disk is full or fails otherwise. The temporary file is removed then.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # same folder: a rename works within a file system
    writer: HashingWriter | None = None
    try:
        with temporary.open("wb") as file:
            if header is not None:
                file.write(header("0" * 64))  # reserve the place: the checksum is known at the end
            writer = HashingWriter(file)
            if callable(data):
                data(writer)
            else:
                writer.write(data.encode() if isinstance(data, str) else data)
            if writer.error is not None:
                raise writer.error
            if header is not None:
                file.seek(0)
                file.write(header(writer.sha256))
            # Before the rename: the file system may store the new name first, and the content only later. A power
            # failure between the two would leave an empty file under the final name.
            file.flush()
            os.fsync(file.fileno())
        if check is not None:
            check(temporary)
        if name is not None:
            path = path.with_name(name(writer.sha256))
        temporary.replace(path)
        fsync(path.parent)  # the rename is an entry of the folder, which has to reach the disk, too
    except OSError as error:
        raise DiskFailed(_failure(path, error, 0 if writer is None else writer.bytes, advice)) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    return Written(path, writer.sha256, writer.bytes)


def write_json(path: Path, values: Any, **options: Any) -> Written:
    """Write JSON values with :func:`write_atomic`, indented, with a newline at the end.

    Args:
        path: The file.
        values: JSON values.
        **options: Of ``json.dumps``.
    """
    return write_atomic(path, json.dumps(values, indent=1, **options) + "\n")


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, read in pieces."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remove_stale(folder: Path) -> list[Path]:
    """Remove temporary files of processes that were killed during :func:`write_atomic` in a folder."""
    stale = [path for path in folder.glob(".*.tmp") if path.is_file()]
    for path in stale:
        with contextlib.suppress(OSError):
            path.unlink()
    return stale


def fsync(path: Path) -> None:
    """Flush a file, or the entries of a folder, from memory to the disk."""
    if path.is_dir():
        if os.name == "nt":  # Windows opens no folders
            return
        handle = os.open(path, os.O_RDONLY)
    else:
        handle = os.open(path, os.O_RDWR)  # Windows flushes only what is open for writing
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _failure(path: Path, error: OSError, needed: int, advice: str) -> str:
    reason = error.strerror or str(error)
    takes = f"it takes {needed:,} bytes" if needed else "nothing was written"
    try:
        free = f"{shutil.disk_usage(path.parent).free:,} are free there"
    except OSError as unknown:
        free = f"how many are free cannot be told ({unknown.strerror})"
    failure = f"{path} cannot be written ({reason}): {takes}, and {free}. Nothing half-written is left."
    return f"{failure} {advice}" if advice else failure
