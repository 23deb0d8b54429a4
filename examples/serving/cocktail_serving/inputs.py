"""From a request's body to what the model takes, with limits."""

from __future__ import annotations

import asyncio
import io
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from fastapi import Request
from jaxtyping import Shaped
from starlette.requests import ClientDisconnect
from torch import Tensor

from .settings import Limits

__all__ = ["CONTENT_TYPE", "Expected", "Refused", "read_body"]

CONTENT_TYPE = "application/x-npy"
MAX_HEADER = 512
"""Characters of an array's own description, which is read as Python literals."""

VERSIONS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


class Refused(Exception):
    """A request that gets an answer of another kind.

    Attributes:
        status: The HTTP status.
        retry_after: Seconds after which it may be tried again, if that is of use.
    """

    def __init__(self, status: int, message: str, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after = retry_after


async def read_body(request: Request, limits: Limits) -> bytes:
    """A request's body.

    Raises:
        Refused: It is of another type, too large, or takes too long.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != CONTENT_TYPE:
        raise Refused(
            415, f"send one array as numpy.save writes it, as {CONTENT_TYPE}; this is {kind[:80] or 'nothing'!r}"
        )
    declared = request.headers.get("content-length", "")
    too_large = Refused(413, f"a body has at most {limits.body_bytes} bytes here: send fewer examples at once")
    if declared.isdecimal() and (len(declared) > 18 or int(declared) > limits.body_bytes):
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(limits.body_seconds):
            async for chunk in request.stream():
                body += chunk
                if len(body) > limits.body_bytes:
                    raise too_large
    except TimeoutError:
        raise Refused(408, f"the body did not arrive within {limits.body_seconds:g} seconds") from None
    except ClientDisconnect:
        raise Refused(400, "the client went away") from None
    return bytes(body)


@dataclass(frozen=True)
class Expected:
    """What one example must be.

    Attributes:
        shape: Its shape.
        dtype: Its type.
        batch: How many there may be in a request.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    batch: int

    @classmethod
    def of(cls, example: Tensor, batch: int) -> Expected:
        """What the examples in a batch are."""
        return cls(tuple(example.shape[1:]), np.dtype(str(example.dtype).removeprefix("torch.")), batch)

    def read(self, body: bytes) -> Shaped[Tensor, "batch *example"]:
        """The array that a body holds, as ``numpy.save`` wrote it. Nothing of it is unpickled.

        Raises:
            Refused: It is none, or of another type, shape, order or length, or not finite.
        """
        shape, in_fortran_order, dtype, begins = _header(body)
        wanted = f"{self.dtype} of (batch, {', '.join(map(str, self.shape))})"
        if dtype != self.dtype or shape[1:] != self.shape or len(shape) != len(self.shape) + 1 or in_fortran_order:
            order = " in Fortran's order" if in_fortran_order else ""
            raise Refused(422, f"the model takes {wanted}, not {dtype} of {shape}{order}")
        if not 1 <= shape[0] <= self.batch:
            raise Refused(422, f"a request has 1 to {self.batch} examples here, not {shape[0]}")
        if len(body) - begins != math.prod(shape) * dtype.itemsize:
            raise Refused(400, f"an array {dtype} of {shape} has another number of bytes than {len(body) - begins}")
        values = np.frombuffer(body, dtype, offset=begins).reshape(shape)
        if not bool(np.isfinite(values).all()):
            raise Refused(422, "there are values that are not finite")
        return torch.from_numpy(values.copy())


def _header(body: bytes) -> tuple[tuple[int, ...], bool, np.dtype[Any], int]:
    """Shape, order and type of an array, and where its values begin."""
    file = io.BytesIO(body)
    try:
        reader = VERSIONS[np.lib.format.read_magic(file)]
        shape, in_fortran_order, dtype = reader(file, max_header_size=MAX_HEADER)
    except Exception:  # what numpy raises depends on where the bytes stop making sense
        raise Refused(400, "the body is no array as numpy.save writes it (no pickle, no structure)") from None
    # numpy lets True through as a number, and negative ones too
    if not all(type(n) is int and n >= 0 for n in shape):
        raise Refused(400, f"the header's shape is {shape}: it must hold whole numbers of at least 0")
    return shape, in_fortran_order, dtype, file.tell()
