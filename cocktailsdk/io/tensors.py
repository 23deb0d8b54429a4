"""safetensors files: written one tensor at a time, and read by the library.

:mod:`.safetensors_reader` reads the files of a bundle, which may come from a stranger.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..errors import TrainingError
from .atomic import HashingWriter, Written, write_atomic

__all__ = ["DTYPES", "READ_ERRORS", "read_tensors", "write_tensors"]

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
