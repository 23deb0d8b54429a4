"""safetensors files: written one tensor at a time; read by the library, or piece by piece with checks.

:class:`TensorFile` reads the files of a bundle, which may come from a stranger. All others are read by the library.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from jaxtyping import UInt8
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..errors import BundleError, TrainingError
from .atomic import HashingWriter, Written, write_atomic
from .limits import MAX_DIMS, MAX_HEADER_BYTES, MAX_TENSORS
from .values import integer, items, keyed, parse, quoted

__all__ = ["DTYPES", "READ_ERRORS", "TensorFile", "read_tensors", "write_tensors"]

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The dtypes of a safetensors file, by their names in its header."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}

READ_ERRORS = (OSError, SafetensorError)
"""Raised by :func:`read_tensors`."""


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file, on the CPU."""
    return load_file(path)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], **options: Any) -> Written:
    """Write a safetensors file with one tensor at a time on the CPU; the library would need all of them there.

    Args:
        path: The file.
        tensors: By name, on any device.
        **options: Of :func:`~cocktailsdk.io.atomic.write_atomic`.

    Raises:
        TrainingError: The disk fails, or the format has no such dtype.
    """
    for key, tensor in tensors.items():
        if tensor.dtype not in _NAMES:
            raise TrainingError(f"{key} has the dtype {tensor.dtype}, which no safetensors file can hold")
    # The widest elements first: then each tensor begins at a multiple of its element size, as readers that map ask for.
    order = sorted(tensors, key=lambda key: (-tensors[key].element_size(), key))
    entries, start = {}, 0
    for key in order:
        tensor = tensors[key]
        end = start + tensor.nbytes
        entries[key] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        start = end
    header = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # the format pads the header with spaces to a multiple of 8 bytes

    def write(writer: HashingWriter) -> None:
        writer.write(len(header).to_bytes(8, "little"))
        writer.write(header)
        for key in order:
            writer.write(_bytes_of(tensors[key]))

    return write_atomic(path, write, **options)


def _bytes_of(tensor: Tensor) -> memoryview:
    """The values in row-major order; not copied if the tensor is contiguous on the CPU."""
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    values: Any = flat.view(torch.uint8).numpy()  # NumPy has no bfloat16
    return memoryview(values)


@dataclass(frozen=True)
class _Entry:
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int  # in the file
    stop: int


class TensorFile:
    """Tensors by name. They are views of the mapped file: copy what is kept.

    safetensors' own reader maps too, but cannot tell which bytes it will touch before it does: here every piece of the
    file is compared with its checksum the first time anything of it is read.

    Args:
        file: Where the file is, for errors.
        opened: The file, open; it may be closed afterwards.
        piece: Bytes of each of its pieces but the last.
        sums: SHA-256 of each piece, in hexadecimal.
        most: How many tensors it may hold.

    Attributes:
        file: The file.
        size: Its bytes.

    Raises:
        BundleError: The file is damaged, or is no safetensors file within the limits.
    """

    def __init__(self, file: Path, opened: BinaryIO, piece: int, sums: list[str], most: int = MAX_TENSORS) -> None:
        self.file = file
        self._piece, self._sums, self._most = piece, sums, most
        self._checked = [False] * len(sums)
        self.size = os.fstat(opened.fileno()).st_size
        if self.size < 8:
            raise BundleError(f"{file} is no safetensors file: it has {self.size} bytes")
        try:
            # a private copy on write: torch takes no buffer that cannot be written to, and nothing here writes
            mapped = mmap.mmap(opened.fileno(), self.size, access=mmap.ACCESS_COPY)
        except (ValueError, OSError) as e:
            raise BundleError(f"{file} cannot be read: {e}") from None
        self._data = torch.frombuffer(mapped, dtype=torch.uint8)
        self._entries = self._header()
        self._named: set[str] = set()

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes by name."""
        return {name: e.shape for name, e in self._entries.items()}

    @property
    def unread(self) -> list[str]:
        """Names of the tensors of which nothing was asked for yet."""
        return [name for name in self._entries if name not in self._named]

    @property
    def bytes_read(self) -> int:
        """Bytes of the pieces that were read."""
        ends = [min((i + 1) * self._piece, self.size) for i in range(len(self._sums))]
        return sum(end - i * self._piece for i, end in enumerate(ends) if self._checked[i])

    def __getitem__(self, name: str) -> Tensor:
        """The tensor of a name."""
        entry = self._entry(name)
        return self._values(name, entry, entry.start, entry.stop).reshape(entry.shape)

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of a tensor."""
        return self._entry(name).dtype

    def numel(self, name: str) -> int:
        """The number of a tensor's elements."""
        return prod(self._entry(name).shape)

    def part(self, name: str, start: int, count: int) -> Tensor:
        """So many elements of a tensor, in row-major order, from one on: ``(count,)``."""
        entry = self._entry(name)
        if start < 0 or count < 0 or start + count > prod(entry.shape):
            raise BundleError(
                f"the bundle needs elements {start} to {start + count} of {name!r}, which has {prod(entry.shape)}"
            )
        first = entry.start + start * entry.dtype.itemsize
        return self._values(name, entry, first, first + count * entry.dtype.itemsize)

    def _entry(self, name: str) -> _Entry:
        if name not in self._entries:
            raise BundleError(f"{self.file} lacks the tensor {quoted(name)}")
        self._named.add(name)
        return self._entries[name]

    def _values(self, name: str, entry: _Entry, start: int, stop: int) -> Tensor:
        raw = self._bytes(start, stop)
        if entry.dtype == torch.bool and bool((raw > 1).any()):
            raise BundleError(f"{self.file}: {name!r} is of booleans, and holds other bytes than 0 and 1")
        return raw.view(entry.dtype)

    def _bytes(self, start: int, stop: int) -> UInt8[Tensor, " bytes"]:
        for i in range(start // self._piece, -(-stop // self._piece) if stop > start else 0):
            if not self._checked[i]:
                begin, end = i * self._piece, min((i + 1) * self._piece, self.size)
                raw: Any = self._data[begin:end].numpy()
                if hashlib.sha256(raw).hexdigest() != self._sums[i]:
                    raise BundleError(
                        f"{self.file} is damaged: bytes {begin} to {end} do not fit their checksum; copy the bundle "
                        "again"
                    )
                self._checked[i] = True
        return self._data[start:stop]

    def _header(self) -> dict[str, _Entry]:
        length = int.from_bytes(self._bytes(0, 8).numpy().tobytes(), "little")
        begin = 8 + length
        if length > MAX_HEADER_BYTES or begin > self.size:
            raise BundleError(
                f"{self.file} says that its header has {length} bytes; the file has {self.size}, and at most "
                f"{MAX_HEADER_BYTES} are read"
            )
        try:
            header = parse(self._bytes(8, begin).numpy().tobytes())
        except (ValueError, RecursionError) as e:
            raise BundleError(f"{self.file} is no safetensors file: its header is not JSON ({e})") from None
        if type(header) is not dict:
            raise BundleError(f"{self.file} is no safetensors file: its header is no object")
        header.pop("__metadata__", None)
        if len(header) > self._most:
            raise BundleError(f"{self.file} holds {len(header)} tensors; at most {self._most} are read")
        out = {name: self._entry_of(name, value, begin) for name, value in header.items()}
        at = begin
        for name, entry in sorted(out.items(), key=lambda e: (e[1].start, e[1].stop)):
            if entry.start != at:
                raise BundleError(f"{self.file}: {quoted(name)} does not begin where the tensor before it ends")
            at = entry.stop
        if at != self.size:
            raise BundleError(f"{self.file} has {self.size - at} bytes that belong to no tensor")
        return out

    def _entry_of(self, name: str, value: Any, begin: int) -> _Entry:
        what = f"the tensor {quoted(name)}"
        entry: Mapping[str, Any] = keyed(value, what, ("dtype", "shape", "data_offsets"))
        dtype = DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
        if dtype is None:
            raise BundleError(f"{self.file}: {what} is of {quoted(entry['dtype'])}, which is not known")
        shape = tuple(integer(n, f"the shape of {what}") for n in items(entry["shape"], f"the shape of {what}"))
        if len(shape) > MAX_DIMS:
            raise BundleError(f"{self.file}: {what} has {len(shape)} dimensions; at most {MAX_DIMS} are read")
        start, stop = (
            integer(n, f"the place of {what}") for n in items(entry["data_offsets"], f"the place of {what}", 2)
        )
        if stop - start != prod(shape) * dtype.itemsize:
            raise BundleError(f"{self.file}: {what} of shape {list(shape)} does not take {stop - start} bytes")
        if begin + stop > self.size:
            raise BundleError(f"{self.file} is truncated: {what} ends past its end")
        if (begin + start) % dtype.itemsize:
            raise BundleError(f"{self.file}: {what} does not lie at a multiple of its elements' size")
        return _Entry(dtype, shape, begin + start, begin + stop)
