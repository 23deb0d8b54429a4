"""N:M sparsity: of every M consecutive weights along the input channels at most N are kept."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, Self

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..errors import PatternError
from ..graph import Weight
from ..masks import Mask
from ..masks.tiles import covered_by_runs, runs, split_inputs
from .base import UMG, Pattern, Subnet
from .checking import covered_share, refuse, weight_masks, zeros_among_covered
from .magnitudes import Scratch, infinity_bits, magnitude_bits, nan_error, piece_size, ranked_dtype
from .registry import register_pattern

DEFAULT_PAIRS = ((1, 2), (2, 4), (4, 8))
_LONGEST_COMPARED = 32  # beyond, sorting takes fewer comparisons


def check_runs(
    subnet: Subnet,
    weight: Weight,
    masks: Sequence[Bool[Tensor, "..."] | None],
    parts: Sequence[Bool[Tensor, "parts m ..."] | None],
    size: int,
    n: int,
) -> None:
    """See that all runs of a weight keep N, and that what lies in no run is kept.

    Args:
        subnet: The subnetwork.
        weight: The weight.
        masks: What is kept of it, and what is hidden (``UMG.hidden``); ``None`` for all, and for nothing.
        parts: The same, cut into runs (the second axis) or tiles (the second and third); ``None`` where there are none.
        size: How many elements lie in runs or tiles.
        n: N.

    Raises:
        PatternError: It is not so.
    """
    (keep, hidden), (kept, unseen) = masks, parts
    if keep is None:
        if size:
            refuse(subnet, f"nothing of {weight.name!r} is masked, and {size} of its weights lie in runs")
        return
    outside = int((keep if hidden is None else keep | hidden).count_nonzero())
    if kept is not None:
        for axis in range(1, kept.ndim):
            least = kept.sum(axis)
            most = least if unseen is None else least + unseen.sum(axis)
            wrong = (least > n) | (most < n)
            if bool(wrong.any()):
                found = int(least[wrong][0])
                refuse(
                    subnet,
                    f"{int(wrong.sum())} of {wrong.numel()} runs of {weight.name!r} do not keep {n} of "
                    f"{kept.shape[axis]} weights, the first of them {found}",
                )
        outside -= int((kept if unseen is None else kept | unseen).count_nonzero())
    if outside != weight.numel - size:
        refuse(subnet, f"weights of {weight.name!r} are masked that lie in no run")


def nm_mask(weight: Weight, value: Float[Tensor, "..."], n: int, m: int) -> Bool[Tensor, "..."]:
    """Keep the N largest magnitudes of each run, ties by position; a remainder is not pruned.

    Exact whatever the dtype. Besides the result it takes temporaries of up to ten MB.

    Raises:
        PatternError: The weight is not of floating point, or some of it is NaN.
    """
    value, dtype = value.detach(), ranked_dtype({weight.name: value})
    keep = torch.empty(value.shape, dtype=torch.bool, device=value.device)
    if covered_by_runs(weight, m) < weight.numel:
        keep.fill_(True)
    nan = torch.zeros((), dtype=torch.int64, device=value.device)
    scratch, flags = (Scratch(), Scratch(), Scratch()), Scratch()
    for part, kept in _blocks(_places(weight, value, m), _places(weight, keep, m)):
        keys = magnitude_bits(part.to(dtype), scratch[0])
        nan += keys.amax() > infinity_bits(dtype)
        largest = _largest_by_sorting(keys, n) if m > _LONGEST_COMPARED else _largest(keys, n, *scratch[1:])
        stays = flags.of(tuple(keys.shape), torch.bool, keys.device).copy_(largest)
        for place, into in zip(stays, kept, strict=True):  # bytes, a place of the run at a time: quicker than at once
            into.copy_(place)
    if int(nan):
        raise nan_error(weight.name, int(value.isnan().sum()))
    return keep


def _places(weight: Weight, tensor: Tensor, m: int) -> Tensor:
    """A view with the places in a run as its first axis; remainders are left out."""
    axis = weight.in_axis
    if split_inputs(weight):
        tensor, axis = tensor.unflatten(0, (weight.groups, -1)), 1
    n = tensor.shape[axis] // m
    return tensor.narrow(axis, 0, n * m).unflatten(axis, (n, m)).movedim(axis + 1, 0)


def _blocks(a: Tensor, b: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Two tensors of one shape in parts of limited size, whole along their first axis."""
    axis = next((d for d in range(1, a.ndim) if a.shape[d] > 1), None)
    if a.numel() <= piece_size(a.device) or axis is None:
        if a.numel():
            yield a, b
        return
    size = max(1, a.shape[axis] * piece_size(a.device) // a.numel())
    for part, beside in zip(a.split(size, axis), b.split(size, axis), strict=True):
        yield from _blocks(part, beside)


def _largest(keys: Int[Tensor, "m ..."], n: int, scratch: Scratch, other: Scratch) -> Int[Tensor, "m ..."]:
    """1 for the N largest along the first axis, ties by position: those that fewer than N others come before.

    Each is compared with every other. Comparing into integers is vectorised, into bools it is not.
    """
    m = keys.shape[0]
    before = scratch.of(tuple(keys.shape), keys.dtype, keys.device)
    before.copy_(torch.arange(m, device=keys.device).reshape(-1, *[1] * (keys.ndim - 1)))
    for d in range(1, m):  # of two, the later comes before the earlier where it is larger, and else after it
        shape = (m - d, *keys.shape[1:])
        larger = torch.lt(keys[:-d], keys[d:], out=other.of(shape, keys.dtype, keys.device))
        before[:-d] += larger
        before[d:] -= larger
    return before.lt_(n)


def _largest_by_sorting(keys: Int[Tensor, "m ..."], n: int) -> Bool[Tensor, "m ..."]:
    order = keys.argsort(dim=0, descending=True, stable=True)[:n]
    return torch.zeros(keys.shape, dtype=torch.bool, device=keys.device).scatter_(0, order, True)


@register_pattern("n:m")
class NM(Pattern):
    """N of every M consecutive input channels are kept, for each kernel position (paper, Section 3.2).

    Runs go along the input channels, as sparse tensor cores and NVIDIA's ASP read them. A remainder shorter than M
    is not pruned and counts as not covered; the exact sparsity is that of the weights covered.

    Args:
        n: Weights kept of each run.
        m: Length of a run.
        pairs: Several (n, m) instead of one; by default 1:2, 2:4 and 4:8, all 50 % sparse.

    Raises:
        PatternError: Not 0 < n < m, or a pair twice.
    """

    nested = False
    term = "n:m"

    def __init__(
        self, n: int | None = None, m: int | None = None, *, pairs: Sequence[Sequence[int]] | None = None
    ) -> None:
        if (n is None) != (m is None) or (n is not None and pairs is not None):
            raise PatternError(f"NM takes n and m, or pairs, or nothing; found n={n!r}, m={m!r}, pairs={pairs!r}")
        chosen: Sequence[Sequence[Any]] = pairs if pairs is not None else DEFAULT_PAIRS if n is None else ((n, m),)
        for pair in chosen:
            if len(pair) != 2 or any(isinstance(x, bool) or not isinstance(x, int) for x in pair):
                raise PatternError(f"n:m takes pairs of whole numbers, not {pair!r}")
            if not 0 < pair[0] < pair[1]:
                raise PatternError(f"n:m needs 0 < n < m, found {pair[0]}:{pair[1]}")
        self.pairs = tuple((int(a), int(b)) for a, b in chosen)
        if not self.pairs or len(set(self.pairs)) < len(self.pairs):
            raise PatternError(f"n:m needs at least one pair, each once; found {list(self.pairs)}")

    def subnets(self) -> tuple[Subnet, ...]:
        """One for each pair, named like ``"2:4"``."""
        return tuple(Subnet(f"{n}:{m}", self.name, 1.0 - n / m, {"n": n, "m": m}) for n, m in self.pairs)

    def mask(self, subnet: Subnet, umg: UMG) -> Mask:
        """The N largest of each run of M, from the weights as they are."""
        n, m = subnet.options["n"], subnet.options["m"]
        return Mask({w.name: nm_mask(w, umg.ranked[w.name], n, m).cpu() for w in umg.eligible})

    def rounds(self, total: int) -> tuple[tuple[Subnet, ...], ...]:
        """One N:M network at a time; none in round 1, where there are rounds enough.

        Of 3 networks over 10 rounds the first trains in rounds 2-4, the second in 5-7, the third in 8-10. Where
        fewer than one round each is left after the first, all rounds are used, several networks sharing one if need be.
        """
        levels = self.subnets()
        if total - 1 < len(levels):
            return super().rounds(total)
        return ((), *((levels[k * len(levels) // (total - 1)],) for k in range(total - 1)))

    def exact_sparsity(self, subnet: Subnet, mask: Mask, umg: UMG) -> float:
        """Zeros among the weights covered."""
        return zeros_among_covered(mask, umg, lambda weight: self._covered(weight, subnet.options["m"]))

    def check(self, subnet: Subnet, mask: Mask, umg: UMG) -> None:
        """Every run keeps exactly N weights, and remainders are not pruned.

        Raises:
            PatternError: It is not so.
        """
        n, m = subnet.options["n"], subnet.options["m"]
        for weight, keep, hidden in weight_masks(subnet, mask, umg):
            size = covered_by_runs(weight, m)
            if not size:
                parts: Sequence[Tensor | None] = (None, None)
            else:
                parts = [None if t is None else runs(weight, t, m).reshape(-1, m) for t in (keep, hidden)]
            check_runs(subnet, weight, (keep, hidden), parts, size, n)

    def coverage(self, subnet: Subnet, mask: Mask, umg: UMG) -> float:
        """The share of eligible weights that lie in full runs of M."""
        del mask
        return covered_share(umg, lambda weight: self._covered(weight, subnet.options["m"]))

    def _covered(self, weight: Weight, m: int) -> int:
        """How many elements of a weight lie in full runs."""
        return covered_by_runs(weight, m)

    def config(self) -> dict[str, Any]:
        """Keyword arguments that make an equal pattern."""
        return {"pairs": [list(p) for p in self.pairs]}

    @classmethod
    def parse(cls, spec: str) -> Self | None:
        """``"n:m"`` is the default three; ``"2:4"`` is one."""
        if spec == cls.name:
            return cls()
        found = re.fullmatch(r"(\d+)\s*:\s*(\d+)", spec)
        return cls(int(found[1]), int(found[2])) if found else None

    def alone(self, name: str) -> Self:
        """One pair of them."""
        return type(self)(pairs=[pair for pair, s in zip(self.pairs, self.subnets(), strict=True) if s.name == name])

    def merged(self, other: Self) -> Self:
        """The pairs of both, in the order given."""
        return type(self)(pairs=list(dict.fromkeys(self.pairs + other.pairs)))
