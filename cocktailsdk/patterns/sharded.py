"""Masks of sharded weights: ranked, compared and summed where they are (method: UMG), the same as of whole ones.

Unstructured masks exchange histograms and counts, channel scores sums of rows, N:M masks nothing. What is gathered is
the masks made. Other patterns are shown whole weights, gathered one at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float64
from torch import Tensor

from ..graph import Producer, Weight
from ..masks import Mask
from .base import UMG, Pattern, Subnet
from .magnitudes import Terms, row_sums
from .nm import NM, nm_mask
from .ranking import Shards, drop_smallest
from .unit_patterns import UnitPattern
from .unit_scores import unit_scores
from .unstructured import Unstructured

__all__ = ["ShardedValues", "sharded_mask"]


@dataclass(frozen=True)
class ShardedValues(Mapping[str, Tensor]):
    """Weights of which each process has some rows; as a mapping they are gathered whole, one at a time.

    Attributes:
        names: Of the weights.
        local: ``local(name)``: the rows that are here, or all where the weight is not sharded.
        rows: ``rows(name)``: which these are; ``None`` where the weight is not sharded.
        whole: ``whole(name)``: all rows.
        total: ``total(tensor)``: the elementwise sum over all processes of a tensor on the CPU.
        rank: This process.
        ranks: How many there are.
    """

    names: tuple[str, ...]
    local: Callable[[str], Tensor]
    rows: Callable[[str], slice | None]
    whole: Callable[[str], Tensor]
    total: Callable[[Tensor], Tensor]
    rank: int
    ranks: int

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.names:
            raise KeyError(name)
        return self.whole(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def mine(self, name: str, tensor: Tensor) -> Tensor:
        """Of a whole tensor like a weight, what is this process's to count: its rows; of a weight that all have, all
        in the first process and none in the others."""
        rows = self.rows(name)
        return tensor[rows] if rows is not None else tensor if self.rank == 0 else tensor[:0]

    def own(self, name: str) -> Tensor:
        """The weight's rows that are this process's to count."""
        value = self.local(name)
        return value if self.rows(name) is not None or self.rank == 0 else value[:0]

    def gathered(self, name: str, part: Bool[Tensor, "rows ..."], shape: tuple[int, ...]) -> Bool[Tensor, "..."]:
        """A mask from the processes' parts of it, on the CPU."""
        out = torch.zeros(shape, dtype=torch.uint8)
        self.mine(name, out).copy_(part)
        return self.total(out).bool()


def sharded_mask(pattern: Pattern, subnet: Subnet, umg: UMG) -> Mask:
    """The mask that a pattern makes of sharded weights; all processes call this, and all have the same.

    Args:
        pattern: The pattern.
        subnet: The subnet.
        umg: Its ``values`` are :class:`ShardedValues`.
    """
    values = umg.values
    assert isinstance(values, ShardedValues)
    if type(pattern) is Unstructured:
        return _unstructured(subnet, umg, values)
    if type(pattern) is NM:
        n, m = subnet.options["n"], subnet.options["m"]
        return Mask({w.name: _nm(w, values, n, m) for w in umg.eligible})
    if isinstance(pattern, UnitPattern) and type(pattern).mask is UnitPattern.mask:
        return pattern.mask_by(unit_scores(umg, pattern.beta, _row_sums), subnet, umg)
    return pattern.mask(subnet, umg)


def _unstructured(subnet: Subnet, umg: UMG, values: ShardedValues) -> Mask:
    shapes = {w.name: tuple(w.shape) for w in umg.eligible}
    before = umg.previous.elements if umg.previous is not None else {}
    gone = sum(before[n].numel() - int(before[n].count_nonzero()) for n in shapes if n in before)
    count = round(subnet.sparsity * sum(w.numel for w in umg.eligible)) - gone
    local_values = {n: values.own(n) for n in shapes}
    keep = {n: values.mine(n, before[n]) for n in shapes if n in before}
    remaining = drop_smallest(local_values, keep, count, shards=Shards(values.total, values.rank, values.ranks))
    return Mask({n: values.gathered(n, remaining[n].cpu(), shapes[n]) for n in shapes})


def _nm(weight: Weight, values: ShardedValues, n: int, m: int) -> Bool[Tensor, "..."]:
    if weight.in_axis == 0:  # runs cross from one process's rows to another's
        return nm_mask(weight, values[weight.name], n, m).cpu()
    value = values.own(weight.name)
    part = torch.zeros(value.shape, dtype=torch.bool)
    if value.numel():
        part = nm_mask(replace(weight, shape=tuple(value.shape)), value, n, m).cpu()
    return values.gathered(weight.name, part, tuple(weight.shape))


def _row_sums(umg: UMG, producer: Producer, terms: Terms) -> Float64[Tensor, " rows"]:
    """The sum of each of a producer's rows, over the rows of all processes."""
    values, name, axis = umg.values, producer.weight, producer.axis
    assert isinstance(values, ShardedValues)
    value = values.own(name)
    mine = [(share, {name: values.mine(name, of[name])} if name in of else {}) for share, of in terms]
    out = torch.zeros(producer.units.numel(), dtype=torch.float64)
    if value.numel():
        sums = row_sums(name, value, axis, mine)
        rows = values.rows(name)
        (out if axis or rows is None else out[rows]).copy_(sums)
    return values.total(out)
