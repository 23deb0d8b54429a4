"""Magnitudes as integers of the same order, a piece at a time.

A float is a sign bit, then the exponent, then the mantissa. Without the sign, a larger exponent is a larger integer,
and of equal exponents so is a larger mantissa: the bits of ``|value|``, read as an integer, order non-negative floats.
As float32, 1.0 is 0x3F800000, 1.5 is 0x3FC00000 and 2.0 is 0x40000000. Comparing the integers is exact, ties included;
-0.0 is 0; infinity is 0x7F800000, and NaN, which has the same exponent and a mantissa, comes after it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

from ..errors import PatternError

__all__ = [
    "Scratch",
    "Terms",
    "infinity_bits",
    "magnitude_bits",
    "nan_error",
    "piece_size",
    "pieces",
    "ranked_dtype",
    "row_sums",
]

_NATIVE = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
}


def ranked_dtype(tensors: Mapping[str, Float[Tensor, "..."]]) -> torch.dtype:
    """The dtype in which tensors are compared: their own, or the narrower of float32 and float64 that holds them all.

    Raises:
        PatternError: One of them is not of floating point.
    """
    found = {v.dtype for v in tensors.values()}
    for name, v in tensors.items():
        if not v.dtype.is_floating_point:
            raise PatternError(
                f"weights are ranked by magnitude, for which they must be floating-point tensors; {name!r} is {v.dtype}"
            )
    if len(found) == 1 and found <= _NATIVE.keys():
        return found.pop()
    return torch.float64 if torch.float64 in found else torch.float32


def infinity_bits(dtype: torch.dtype) -> int:
    """What :func:`magnitude_bits` makes of infinity; NaN has more."""
    return int(torch.tensor([torch.inf], dtype=dtype).view(_NATIVE[dtype]))


def nan_error(name: str, count: int) -> PatternError:
    """The error for weights that are NaN."""
    return PatternError(
        f"{count} of the weights in {name!r} {'is' if count == 1 else 'are'} NaN, which has no magnitude to rank by; "
        "go back to weights from before the loss diverged"
    )


class Scratch:
    """Memory that is used again for every piece; no two tensors of one scratch live at a time.

    New memory for each piece would be mapped and zeroed by the system again and again.
    """

    def __init__(self) -> None:
        self._memory = torch.empty(0)

    def of(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """A tensor of any values."""
        n = torch.Size(shape).numel()
        if self._memory.numel() < n or self._memory.dtype != dtype or self._memory.device != device:
            self._memory = torch.empty(n, dtype=dtype, device=device)
        return self._memory[:n].view(shape)


def magnitude_bits(part: Float[Tensor, "..."], scratch: Scratch) -> Int[Tensor, "..."]:
    """``|value|`` as integers of the same order, in the scratch.

    Args:
        part: Of a dtype that :func:`ranked_dtype` names.
        scratch: Where it goes.
    """
    bits = part.view(_NATIVE[part.dtype])
    # the largest signed integer is 0x7F…F: all bits but the first, the sign
    return torch.bitwise_and(
        bits, torch.iinfo(bits.dtype).max, out=scratch.of(tuple(bits.shape), bits.dtype, bits.device)
    )


def piece_size(device: torch.device) -> int:
    """Elements at a time: what fits the cache of a core, or fills an accelerator."""
    return 1 << 19 if device.type == "cpu" else 1 << 22


def pieces(
    tensor: Float[Tensor, "..."], kept: Bool[Tensor, "..."] | None, dtype: torch.dtype
) -> Iterator[tuple[Float[Tensor, " n"], Bool[Tensor, " n"] | None]]:
    """A tensor in row-major order, in flat pieces of limited size and of a dtype, and what is kept of each.

    Where memory is in that order and of that dtype the pieces are views.
    """
    at, flat = 0, None if kept is None else kept.reshape(-1)
    for part in _flat(tensor.detach(), piece_size(tensor.device)):
        n = part.numel()
        yield part.to(dtype), None if flat is None else flat[at : at + n].to(part.device)
        at += n


def _flat(tensor: Tensor, limit: int) -> Iterator[Tensor]:
    if tensor.is_contiguous() or tensor.numel() <= limit:
        yield from tensor.reshape(-1).split(limit)
    elif tensor.shape[0] == 1:
        yield from _flat(tensor[0], limit)
    else:
        for part in tensor.split(max(1, limit * tensor.shape[0] // tensor.numel())):
            yield from _flat(part, limit)


Terms = Sequence[tuple[float, Mapping[str, Bool[Tensor, "..."]]]]
"""Shares and masks by weight name each, by which magnitudes are weighed; a weight without a mask counts whole."""


def row_sums(name: str, value: Float[Tensor, "..."], axis: int, terms: Terms) -> Float64[Tensor, " rows"]:
    """The sum of each row's magnitudes under masks, weighed: ``Σ share · ‖mask ⊙ row‖₁`` over the terms.

    Args:
        name: The weight's.
        value: Its values.
        axis: Along which the rows are told apart.
        terms: The terms of the sum.

    Returns:
        On the CPU, summed in double precision.

    Raises:
        PatternError: The weight is not of floating point, or some of it is NaN.
    """
    dtype = ranked_dtype({name: value})
    value = value.detach().movedim(axis, 0)
    masks = [(share, None if (m := of.get(name)) is None else m.movedim(axis, 0)) for share, of in terms]
    out = torch.zeros(value.shape[0], dtype=torch.float64)
    scratch, other = Scratch(), Scratch()
    for where in _row_blocks(value):
        keys = magnitude_bits(value[where].to(dtype), scratch)
        for share, mask in masks:
            masked = keys
            if mask is not None:
                masked = other.of(tuple(keys.shape), keys.dtype, keys.device)
                # the bits times 1 or 0: a masked infinity or NaN is 0, as the float product would not be
                masked.copy_(mask[where]).mul_(keys)
            values = masked.view(dtype)  # bits without their sign are the float's magnitude
            out[where[0]] += share * _sums(values.flatten(1) if values.ndim > 1 else values[:, None])
    if bool(out.isnan().any()):
        raise nan_error(name, int(value.isnan().sum()))
    return out


def _row_blocks(value: Tensor) -> Iterator[tuple[slice, ...]]:
    """Slices of limited size along the first axis, and along the second where a row alone is larger."""
    limit, rows = piece_size(value.device), value.shape[0]
    step = max(1, limit * rows // max(1, value.numel()))
    for begin in range(0, rows, step):
        along = slice(begin, begin + step)
        if value.ndim == 1 or value.numel() <= limit * rows:
            yield (along,)
            continue
        width = max(1, limit * rows * value.shape[1] // value.numel())
        for column in range(0, value.shape[1], width):
            yield along, slice(column, column + width)


def _sums(rows: Float[Tensor, "rows n"]) -> Float64[Tensor, " rows"]:
    if rows.device.type == "mps":  # has no float64
        rows = rows.cpu()
    return rows.sum(1, dtype=torch.float64).cpu()
