"""Selection in one pass: a sample brackets the threshold, and only the few elements inside the bracket are ranked.

The threshold is the magnitude up to which elements go. If 20 % go, the 20 % quantile of a sample is close to it, and
the quantiles a little below and above (three standard errors) bracket it. One pass keeps what lies above the bracket,
drops what lies below and collects what lies inside, fewer than one element in a hundred. Of these exactly as many are
dropped as are still missing.

Where the bracket misses the threshold, or so many magnitudes are equal that too many elements lie inside,
:mod:`~cocktailsdk.patterns.ranking` counts histograms instead. The result is the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import sqrt

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Int64
from torch import Tensor

from .magnitudes import Scratch, infinity_bits, magnitude_bits, pieces

__all__ = ["WORTH_A_SAMPLE", "drop_between", "few_positions"]

WORTH_A_SAMPLE = 1 << 20
"""Elements from which on a sample is small beside the whole."""

_SIGMAS = 3.0  # standard errors on each side of the quantile: the bracket misses the threshold once in 370 times
_SAMPLE = 18  # about 2^18 elements are sampled, whatever the model's size
_MOST_BETWEEN = 32  # the bracket is given up where more than one in so many elements lies inside


def drop_between(
    values: Mapping[str, Float[Tensor, "..."]],
    keep: Mapping[str, Bool[Tensor, "..."]],
    dtype: torch.dtype,
    count: int,
    kept: int,
) -> dict[str, Bool[Tensor, "..."]] | None:
    """What :func:`~cocktailsdk.patterns.ranking.drop_smallest` leaves, or ``None`` where one pass does not find it.

    Args:
        values: Tensors by name.
        keep: What is kept so far, by name; tensors not in it are not masked yet.
        dtype: That they are compared in.
        count: How many of those kept go; at least one.
        kept: How many are kept so far.
    """
    total = sum(v.numel() for v in values.values())
    bounds = _bounds(values, keep, dtype, count / kept, total)
    if bounds is None:
        return None
    low, high = bounds
    infinity, limit = infinity_bits(dtype), total // _MOST_BETWEEN
    scratch, above, flags = Scratch(), Scratch(), Scratch()
    out: dict[str, Tensor] = {}
    found: list[tuple[Tensor, Tensor, Tensor]] = []  # a piece of the result, positions in it, and what is there
    between = larger = 0
    for name, value in values.items():
        out[name] = torch.empty(value.shape, dtype=torch.bool, device=value.device)
        flat, at = out[name].view(-1), 0
        for part, k in pieces(value, keep.get(name), dtype):
            stays = flat[at : at + part.numel()]
            at += part.numel()
            keys = magnitude_bits(part, scratch)
            if not keys.numel():
                continue
            if int(keys.amax()) > infinity:
                return None
            # compared into integers, which is vectorised where comparing into bools is not
            more = torch.gt(keys, high, out=above.of(tuple(keys.shape), keys.dtype, keys.device))
            stays.copy_(more)
            # at least low (1 or 0) minus above high (1 or 0): 1 inside the bracket; keys are not needed any more
            inside = flags.of(tuple(keys.shape), torch.bool, keys.device).copy_(keys.ge_(low).sub_(more))
            if k is not None:
                stays &= k
                inside &= k
            positions = few_positions(inside)
            larger += int(stays.count_nonzero())
            between += positions.numel()
            if between > limit:
                return None
            found.append((stays, positions.to(torch.int32), magnitude_bits(part[positions], Scratch())))
    # All below the bracket go, and from inside as many as are missing. Is that impossible, the bracket was off.
    goes = count - (kept - larger - between)
    if not 0 <= goes <= between:
        return None
    _drop_smallest_between(found, goes)
    return out


def _bounds(
    values: Mapping[str, Tensor], keep: Mapping[str, Tensor], dtype: torch.dtype, share: float, total: int
) -> tuple[int, int] | None:
    """Magnitudes, as bits, between which a share of those kept ends, all but certainly."""
    step = max(1, total >> _SAMPLE) | 1  # odd, or it might fall on one column of a matrix
    parts = []
    begin = 0
    for name, value in values.items():
        for part, k in pieces(value, keep.get(name), dtype):
            some = magnitude_bits(part[begin::step].contiguous(), Scratch())
            parts.append((some if k is None else some[k[begin::step]]).cpu())
            begin = (begin - part.numel()) % step  # the stride goes on in the next piece, as in one long tensor
    sample = torch.cat(parts)
    n = sample.numel()
    if n < 1 << 12:  # the bracket would be too wide to save anything
        return None
    # the standard error of a share p among n independent draws is sqrt(p (1 - p) / n); 4 / n is for p near 0 and 1
    margin = _SIGMAS * sqrt(share * (1 - share) / n) + 4 / n
    ends = round((share - margin) * n), round((share + margin) * n)
    inner = [end - 1 for end in ends if 1 <= end <= n]
    # Puts only these order statistics in their places: linear time, where sorting takes n log n.
    ordered = np.partition(sample.numpy(), inner) if inner else sample.numpy()
    low = int(ordered[ends[0] - 1]) if ends[0] >= 1 else 0
    high = int(ordered[ends[1] - 1]) if ends[1] <= n else infinity_bits(dtype)
    return low, high


def _drop_smallest_between(
    found: list[tuple[Bool[Tensor, " n"], Int[Tensor, " k"], Int[Tensor, " k"]]], goes: int
) -> None:
    """Keep all but the smallest ``goes`` of those between, ties by position."""
    keys = torch.cat([k.cpu() for _, _, k in found])
    if goes:
        threshold = int(np.partition(keys.numpy(), goes - 1)[goes - 1])  # selects in linear time, without sorting
        stays = keys > threshold
        ties = goes - int((keys < threshold).count_nonzero())
        stays[(keys == threshold).nonzero()[ties:, 0]] = True
    else:
        stays = torch.ones_like(keys, dtype=torch.bool)
    for (out, positions, _), stay in zip(found, stays.split([k.numel() for _, _, k in found]), strict=True):
        out[positions[stay.to(positions.device)]] = True


def few_positions(chosen: Bool[Tensor, " n"]) -> Int64[Tensor, " found"]:
    """Where few elements are true.

    Eight bools are one int64, which is 0 where none of them is true. ``nonzero`` of an eighth of the elements is eight
    times as quick, and the eights that it finds are looked at one by one. Where more than a quarter of them hold one,
    that would take longer than looking at all.
    """
    n = chosen.numel()
    if n % 8 or chosen.device.type != "cpu":
        return chosen.nonzero()[:, 0]
    eights = chosen.view(torch.int64).nonzero()
    if eights.numel() > n // 32:
        return chosen.nonzero()[:, 0]
    around = (eights * 8 + torch.arange(8)).reshape(-1)
    return around[chosen[around]]
