"""Exact selection of the smallest magnitudes over many tensors, without sorting or copying them together."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

_DIGIT = 16  # bits a pass; 2^16 counters


def drop_smallest(
    values: Mapping[str, Float[Tensor, "..."]], keep: Mapping[str, Bool[Tensor, "..."]], count: int
) -> dict[str, Bool[Tensor, "..."]]:
    """Of everything still kept, drop exactly ``count`` elements: those of least magnitude.

    Ties go by position: tensors in the mapping's order, then row-major. A radix selection over the bits of
    ``|value|``, which order non-negative floats as integers, finds the threshold; at any time it holds temporaries
    for one tensor only.

    Args:
        values: Tensors by name, on any devices; half precisions are compared exactly.
        keep: For each of them what is kept so far, same shape and device.
        count: How many more go; at most what is kept.

    Returns:
        What is kept afterwards, by name.
    """
    if count <= 0:
        return {name: k.clone() for name, k in keep.items()}
    wide = any(v.dtype == torch.float64 for v in values.values())
    bits = 64 if wide else 32

    def key(name: str) -> Int[Tensor, "..."]:
        v = values[name].detach().abs()
        return v.to(torch.float64).view(torch.int64) if wide else v.to(torch.float32).view(torch.int32)

    threshold, ties = _threshold(key, keep, count, bits)
    out: dict[str, Tensor] = {}
    for name, kept in keep.items():
        k = key(name)
        left = kept & (k >= threshold)
        if ties:
            tied = (left & (k == threshold)).reshape(-1).nonzero()[:ties, 0]
            ties -= tied.numel()
            flat = left.reshape(-1)
            flat[tied] = False
            left = flat.reshape(left.shape)
        out[name] = left
    return out


def _threshold(
    key: Callable[[str], Int[Tensor, "..."]], keep: Mapping[str, Bool[Tensor, "..."]], rank: int, bits: int
) -> tuple[int, int]:
    """The ``rank``-th smallest key (from 1), and how many of those equal to it are among the first ``rank``."""
    prefix = 0
    for shift in range(bits - _DIGIT, -1, -_DIGIT):
        counts = torch.zeros(1 << _DIGIT, dtype=torch.int64)
        for name, kept in keep.items():
            k = key(name)
            chosen = kept if shift == bits - _DIGIT else kept & ((k >> (shift + _DIGIT)) == prefix)
            digits = (k[chosen] >> shift) & ((1 << _DIGIT) - 1)
            counts += torch.bincount(digits, minlength=1 << _DIGIT).cpu()
        upto = counts.cumsum(0)
        digit = int(torch.searchsorted(upto, torch.tensor(rank)))
        if digit:
            rank -= int(upto[digit - 1])
        prefix = (prefix << _DIGIT) | digit
    return prefix, rank
