"""Files that are there as a whole or not at all: streamed, hashed, flushed to the disk, then renamed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ..errors import TrainingError
from . import open_regular

__all__ = [
    "DiskFailed",
    "Sink",
    "Written",
    "clean",
    "read_sum",
    "tensor_bytes",
    "write_atomic",
    "write_tensors",
    "write_whole",
]

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class Written:
    """A file that was written.

    Attributes:
        path: Where it is.
        sha256: Of its content, without a head.
        bytes: Of the same.
    """

    path: Path
    sha256: str
    bytes: int


class Sink:
    """Writes to a file, and counts and hashes what it writes.

    A failure is kept until the writing is over, since serializers written in C++ do not survive an exception in
    what they write to; what comes after it is only counted.

    Attributes:
        bytes: Written so far, or that would have been.
        error: What went wrong.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._sum = file, hashlib.sha256()
        self.bytes = 0
        self.error: BaseException | None = None

    def write(self, data: Any) -> int:
        """Write any buffer."""
        size = memoryview(data).nbytes
        self.bytes += size
        if self.error is None:
            try:
                self._file.write(data)
                self._sum.update(data)
            except BaseException as error:  # a second Ctrl-C too
                self.error = error
        return size

    def flush(self) -> None:
        """Nothing: the file is flushed once, at its end."""

    @property
    def sha256(self) -> str:
        """Of all that was written."""
        return self._sum.hexdigest()


class DiskFailed(TrainingError):
    """A file of a run cannot be written."""


def write_whole(
    path: Path,
    fill: Callable[[Sink], None],
    *,
    head: Callable[[str], bytes] | None = None,
    name: Callable[[str], str] | None = None,
    check: Callable[[Path], None] | None = None,
    standing: str = "",
) -> Written:
    """Write a file such that after a crash there is either all of it or what was there before.

    Args:
        path: Where to.
        fill: Writes the content.
        head: A first part of a fixed length, made of the content's checksum.
        name: The file's name, made of the content's checksum, in place of the path's.
        check: Looks at the file before it gets its name; what it raises ends the writing.
        standing: What is said of the state before, where the disk fails.

    Raises:
        DiskFailed: The disk is full or fails otherwise. Nothing is left of the file then.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    sink: Sink | None = None
    try:
        with beside.open("wb") as file:
            if head is not None:
                file.write(head("0" * 64))
            sink = Sink(file)
            fill(sink)
            if sink.error is not None:
                raise sink.error
            if head is not None:
                file.seek(0)
                file.write(head(sink.sha256))
            file.flush()
            os.fsync(file.fileno())
        if check is not None:
            check(beside)
        if name is not None:
            path = path.with_name(name(sink.sha256))
        beside.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        raise DiskFailed(_failed(path, error, 0 if sink is None else sink.bytes, standing)) from error
    finally:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
    return Written(path, sink.sha256, sink.bytes)


def write_atomic(path: Path, data: bytes) -> None:
    """Write bytes as :func:`write_whole` does."""

    def fill(sink: Sink) -> None:
        sink.write(data)

    write_whole(path, fill)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], **options: Any) -> Written:
    """Write a safetensors file with one tensor at a time in memory, whatever device they are on.

    Args:
        path: Where to.
        tensors: By name.
        **options: Of :func:`write_whole`.

    Raises:
        TrainingError: Where the disk fails, or the format has no such dtype.
    """
    for key, tensor in tensors.items():
        if tensor.dtype not in _DTYPES:
            raise TrainingError(f"{key} has the dtype {tensor.dtype}, which no safetensors file can hold")
    # the widest first, so that every tensor is aligned
    order = sorted(tensors, key=lambda key: (-tensors[key].element_size(), key))
    entries, at = {}, 0
    for key in order:
        tensor = tensors[key]
        end = at + tensor.numel() * tensor.element_size()
        entries[key] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, end]}
        at = end
    header = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)

    def fill(sink: Sink) -> None:
        sink.write(len(header).to_bytes(8, "little"))
        sink.write(header)
        for key in order:
            sink.write(tensor_bytes(tensors[key]))

    return write_whole(path, fill, **options)


def tensor_bytes(tensor: Tensor) -> memoryview:
    """A tensor's values in row-major order; its own memory where it lies so on the CPU."""
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    values: Any = flat.view(torch.uint8).numpy()
    return memoryview(values)


def read_sum(path: Path) -> str:
    """SHA-256 of a file, read in pieces."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def clean(folder: Path) -> list[Path]:
    """Remove what a process that was killed in the middle of :func:`write_whole` left in a folder."""
    stale = [path for path in folder.glob(".*.tmp") if path.is_file()]
    for path in stale:
        with contextlib.suppress(OSError):
            path.unlink()
    return stale


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":  # folders cannot be opened there
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _failed(path: Path, error: OSError, needed: int, standing: str) -> str:
    what = error.strerror or str(error)
    takes = f"it takes {needed:,} bytes" if needed else "nothing was written"
    try:
        free = f"{shutil.disk_usage(path.parent).free:,} are free there"
    except OSError as unknown:
        free = f"how many are free cannot be told ({unknown.strerror})"
    said = f" {standing}" if standing else ""
    return f"{path} cannot be written ({what}): {takes}, and {free}. Nothing half-written is left.{said}"
