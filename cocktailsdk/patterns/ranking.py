"""Exact selection of the smallest magnitudes over many tensors, without sorting or copying them together.

The bits of ``|value|`` order non-negative floats as integers (see :mod:`~cocktailsdk.patterns.magnitudes`). So the
threshold is found as in a radix sort, 16 bits at a time: a histogram of the first 16 bits of everything says in which
bucket it lies, a histogram of the next 16 bits of that bucket alone says where inside, and so on. If the third smallest
of 0x3F80_0000, 0x3F80_4000, 0x3FC0_0000 and 0x4000_0000 is wanted, the first histogram counts two in 0x3F80, so the
threshold is the smallest in the next bucket, 0x3FC0. Half precisions need one pass, single precision two, the second
over a few elements. Large tensors in one process mostly take a single pass, with the same result (see
:mod:`~cocktailsdk.patterns.bracketing`). Everything goes through memory in pieces, so that temporaries are small
whatever the model's size.

Where tensors are sharded over ranks, only histograms and counts are exchanged: see :class:`Shards`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from ..errors import PatternError
from .bracketing import WORTH_A_SAMPLE, drop_between, few_positions
from .magnitudes import Scratch, infinity_bits, magnitude_bits, nan_error, piece_size, pieces, ranked_dtype

__all__ = ["Shards", "drop_smallest", "histogram"]

_DIGIT = 16  # bits a pass; 2^16 counters


@dataclass(frozen=True)
class Shards:
    """How ranks that hold slices of the same tensors rank them together, exactly and without gathering them.

    Every rank passes the same names in the same order, with its own slice of each tensor: contiguous rows (a slice
    along the first axis), those of lower ranks first. A slice may be empty; a tensor that all ranks hold whole is
    passed by one and empty by the others. Then the result is what one process would find on whole tensors, ties
    included.

    Attributes:
        total: ``total(counts)``: the elementwise sum over all ranks of an int64 tensor on the CPU, on the CPU: an
            all-reduce. It is called equally often, with equal shapes, on every rank. At most 2^16 numbers each.
        rank: This rank.
        ranks: How many there are.
    """

    total: Callable[[Int64[Tensor, "..."]], Int64[Tensor, "..."]]
    rank: int
    ranks: int


def drop_smallest(
    values: Mapping[str, Float[Tensor, "..."]],
    keep: Mapping[str, Bool[Tensor, "..."]],
    count: int,
    shards: Shards | None = None,
    kept: int | None = None,
) -> dict[str, Bool[Tensor, "..."]]:
    """Of everything still kept, drop exactly ``count`` elements: those of least magnitude.

    Ties go by position: tensors in the mapping's order, then row-major. Magnitudes are compared exactly, whatever the
    dtypes; -0.0 is 0. Besides the result, temporaries of up to ten MB are all it takes.

    Args:
        values: Tensors by name, on any devices.
        keep: What is kept so far, by name, same shapes, on any device. Tensors not in it are not masked yet.
        count: How many more go; at most what is kept, over all ranks.
        shards: Where the tensors are slices of larger ones, how the ranks that hold them agree.
        kept: How many are kept so far, where that is known.

    Returns:
        What is kept afterwards, by name, on the tensors' devices.

    Raises:
        PatternError: A tensor that is not of floating point, NaN among what is kept, or ``count`` exceeds it.
    """
    dtype = ranked_dtype(values)
    if count <= 0:
        return {
            n: keep[n].to(v.device, copy=True) if n in keep else torch.ones_like(v, dtype=torch.bool)
            for n, v in values.items()
        }
    total = sum(v.numel() for v in values.values())
    if shards is None and total >= WORTH_A_SAMPLE:
        if kept is None:
            kept = total - sum(k.numel() - int(k.count_nonzero()) for k in keep.values())
        if count <= kept and (found := drop_between(values, keep, dtype, count, kept)) is not None:
            return found
    threshold, ties, equal = _threshold(values, keep, dtype, count, shards)
    share = _tie_shares(values, keep, dtype, threshold, ties, shards) if shards and ties < equal else None
    all_go = ties == equal
    out: dict[str, Tensor] = {}
    for name, value in values.items():
        goes = share[name] if share is not None else ties
        out[name], tied = _above(value, keep.get(name), dtype, threshold, None if all_go else goes)
        ties -= tied
    return out


def histogram(
    values: Mapping[str, Float[Tensor, "..."]],
    keep: Mapping[str, Bool[Tensor, "..."]],
    dtype: torch.dtype,
    digit: int = 0,
    prefix: int = 0,
) -> Int64[Tensor, " digits"]:
    """How many kept elements have which 16 bits of ``|value|`` at a place.

    Histograms of slices add up to that of the whole.

    Args:
        values: Tensors by name.
        keep: What is kept so far, by name; tensors not in it are not masked yet.
        dtype: See :func:`ranked_dtype`.
        digit: The place: 0 for the first 16 bits (their first, the sign, is 0), 1 for the next.
        prefix: The bits before that place; only elements that begin with them are counted.

    Returns:
        On the CPU; 2^15 numbers for digit 0, 2^16 otherwise.
    """
    counter = _Counter(1 << (_DIGIT if digit else _DIGIT - 1))  # the sign of magnitudes is 0: half as many first digits
    for name, value in values.items():
        kept = keep.get(name)
        if digit == 0:
            _count_first(counter, value, kept, dtype)
        else:
            _count_next(counter, value, kept, dtype, digit, prefix)
    return counter.counts()


class _Counter:
    """A histogram into which small tensors go together, since a histogram costs as much as its counters."""

    def __init__(self, bins: int) -> None:
        self._bins = bins
        self._buffers: dict[torch.device, list[Tensor]] = {}  # digits, a scratch as large, counts
        self._filled: dict[torch.device, int] = {}

    def room(self, n: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Where the next ``n`` digits are to be written, and as much scratch."""
        if device not in self._buffers:
            size = piece_size(device)
            dtype = torch.int16 if self._bins <= 1 << 15 else torch.int32  # 2^16 - 1 is too large for an int16
            digits = torch.empty(size, dtype=dtype, device=device)
            self._buffers[device] = [digits, torch.empty_like(digits), torch.zeros(self._bins, dtype=torch.int64)]
            self._filled[device] = 0
        digits, scratch, _ = self._buffers[device]
        if self._filled[device] + n > digits.numel():
            self._flush(device)
        begin = self._filled[device]
        self._filled[device] = begin + n
        return digits[begin : begin + n], scratch[:n]

    def _flush(self, device: torch.device) -> None:
        digits, _, counts = self._buffers[device]
        if self._filled[device]:
            counts += torch.bincount(digits[: self._filled[device]], minlength=self._bins).cpu()
        self._filled[device] = 0

    def counts(self) -> Int64[Tensor, " digits"]:
        out = torch.zeros(self._bins, dtype=torch.int64)
        for device, (_, _, counts) in self._buffers.items():
            self._flush(device)
            out += counts
        return out

    def take_away(self, zeros: int, device: torch.device) -> None:
        """Count so many zeros less."""
        self._buffers[device][2][0] -= zeros


def _count_first(counter: _Counter, value: Tensor, kept: Tensor | None, dtype: torch.dtype) -> None:
    shift = (dtype.itemsize - 2) * 8
    scratch = Scratch()
    for part, k in pieces(value, kept, dtype):
        if not part.numel():
            continue
        digits, flags = counter.room(part.numel(), part.device)
        digits.copy_(magnitude_bits(part, scratch).bitwise_right_shift_(shift))
        if k is not None:  # masked elements become 0 and are taken off its count: quicker than selecting the others
            digits.mul_(flags.copy_(k))
            counter.take_away(k.numel() - int(k.count_nonzero()), part.device)


def _count_next(
    counter: _Counter, value: Tensor, kept: Tensor | None, dtype: torch.dtype, digit: int, prefix: int
) -> None:
    shift = dtype.itemsize * 8 - _DIGIT * (digit + 1)  # after which the wanted digit is the lowest
    scratch, flags = Scratch(), Scratch()
    for part, k in pieces(value, kept, dtype):
        begin = magnitude_bits(part, scratch).bitwise_right_shift_(shift + _DIGIT)
        chosen = flags.of((part.numel(),), torch.bool, part.device).copy_(begin.eq_(prefix))
        if k is not None:
            chosen &= k
        keys = magnitude_bits(part[few_positions(chosen)], scratch)
        if keys.numel():
            digits, _ = counter.room(keys.numel(), part.device)
            digits.copy_(keys.bitwise_right_shift_(shift).bitwise_and_(0xFFFF))  # without the prefix above


def _threshold(
    values: Mapping[str, Tensor], keep: Mapping[str, Tensor], dtype: torch.dtype, rank: int, shards: Shards | None
) -> tuple[int, int, int]:
    """The ``rank``-th smallest key (from 1), how many of those equal to it are among the first, and how many are."""
    prefix, equal, asked = 0, 0, rank
    for digit in range(dtype.itemsize * 8 // _DIGIT):
        counts = histogram(values, keep, dtype, digit, prefix)
        if shards is not None:
            counts = shards.total(counts)
        if digit == 0:
            _refuse_nan(values, keep, dtype, counts, shards)
        upto = counts.cumsum(0)  # of each bucket, how many elements lie in it or below
        if rank > int(upto[-1]):
            raise PatternError(f"cannot drop {asked} of {int(upto[-1])} elements that are kept")
        found = int(torch.searchsorted(upto, torch.tensor(rank)))
        equal = int(counts[found])
        if found:
            rank -= int(upto[found - 1])
        prefix = (prefix << _DIGIT) | found
    return prefix, rank, equal


def _refuse_nan(
    values: Mapping[str, Tensor],
    keep: Mapping[str, Tensor],
    dtype: torch.dtype,
    counts: Int64[Tensor, " digits"],
    shards: Shards | None,
) -> None:
    # NaN shares its first digit with infinity (float32) or lies above: if no element does, there is none to look for
    infinity = infinity_bits(dtype) >> (dtype.itemsize * 8 - _DIGIT)
    if not int(counts[infinity:].sum()):
        return
    found = torch.zeros(len(values), dtype=torch.int64)
    for i, (name, value) in enumerate(values.items()):
        for part, k in pieces(value, keep.get(name), dtype):
            nan = part.isnan() if k is None else part.isnan() & k
            found[i] += nan.count_nonzero().cpu()
    if shards is not None:
        found = shards.total(found)
    for name, n in zip(values, found.tolist(), strict=True):
        if n:
            raise nan_error(name, n)


def _tie_shares(
    values: Mapping[str, Tensor],
    keep: Mapping[str, Tensor],
    dtype: torch.dtype,
    threshold: int,
    ties: int,
    shards: Shards,
) -> dict[str, int]:
    """How many of the elements equal to the threshold go from this rank's slice of each tensor."""
    own = torch.zeros(shards.ranks, len(values), dtype=torch.int64)
    scratch = Scratch()
    for i, (name, value) in enumerate(values.items()):
        for part, k in pieces(value, keep.get(name), dtype):
            tied = magnitude_bits(part, scratch).eq_(threshold)
            own[shards.rank, i] += (tied if k is None else tied * k).count_nonzero().cpu()
    in_order = shards.total(own).T.reshape(-1)  # by tensor, then by rank, as positions go
    before = in_order.cumsum(0) - in_order
    goes = torch.minimum((ties - before).clamp(min=0), in_order).reshape(len(values), shards.ranks)
    return dict(zip(values, goes[:, shards.rank].tolist(), strict=True))


def _above(
    value: Tensor, kept: Tensor | None, dtype: torch.dtype, threshold: int, ties: int | None
) -> tuple[Bool[Tensor, "..."], int]:
    """What is kept and above the threshold, the first ``ties`` of those equal to it not (``None``: none of them is).

    Returns:
        The mask, and how many were dropped of those equal.
    """
    out = torch.empty(value.shape, dtype=torch.bool, device=value.device)
    flat, at, dropped, scratch = out.view(-1), 0, 0, Scratch()
    for part, k in pieces(value, kept, dtype):
        left = flat[at : at + part.numel()]
        at += part.numel()
        if ties is not None and dropped < ties:
            tied = magnitude_bits(part, scratch) == threshold
            if k is not None:
                tied &= k
            first = tied.nonzero()[: ties - dropped, 0]
            dropped += first.numel()
        else:
            first = None
        keys = magnitude_bits(part, scratch)
        # compared into integers, which is vectorised where comparing into bools is not
        left.copy_(keys.gt_(threshold) if ties is None else keys.ge_(threshold))
        if k is not None:
            left &= k
        if first is not None:
            left[first] = False
    return out, dropped
