"""A safetensors file of a bundle, mapped into memory: what is read is checked, the rest is not touched."""

from __future__ import annotations

import hashlib
import mmap
import os
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from jaxtyping import UInt8
from torch import Tensor

from ..errors import BundleError
from .limits import MAX_DIMS, MAX_HEADER_BYTES, MAX_TENSORS
from .tensors import DTYPES
from .values import integer, items, keyed, parse, quoted

__all__ = ["TensorFile"]


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
