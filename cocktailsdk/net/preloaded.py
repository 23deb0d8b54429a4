"""Subnetworks' weights and statistics made before they are needed, and given to a model's tensors in no time.

What a switch to them costs is then no longer that of bytes but of every tensor that is touched and every call of
Python for it. So all that can be found out beforehand is held in lists, and loops are C's where there are such.
"""

from __future__ import annotations

import itertools
import operator
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .edits import Samples, versions_of

__all__ = ["Ready", "Statistics", "Swap"]

_version = operator.attrgetter("_version")


class Swap:
    """Other values for some of a model's tensors.

    The tensors are given the memory that holds these, and later the memory that holds their dense values, which is
    neither written nor copied.

    Args:
        where: By name, the table of a module and the key in it where each tensor is.
        dense: By name, the dense values, in the memory that is the tensor's own.
        values: By the same names in the same order, others of the same shapes, strides and dtypes.
        ours: By name, how often a tensor's version went up because of us; kept up to date here.
        samples: Whether to notice values that are written through ``.data`` while the tensors have the others.

    Attributes:
        dense: As given.
    """

    def __init__(
        self,
        where: Mapping[str, tuple[dict[str, Tensor], str]],
        dense: Mapping[str, Tensor],
        values: Mapping[str, Tensor],
        ours: Counter[str],
        *,
        samples: bool,
    ) -> None:
        self.dense = dict(dense)
        self.names = frozenset(dense)
        self._own = [where[n][0][where[n][1]] for n in dense]
        self._tables = list({id(table): table for table, _ in map(where.__getitem__, dense)}.values())
        self._held = list(itertools.chain.from_iterable(map(dict.values, self._tables)))
        self._ours = ours
        self._old, self._new = list(dense.values()), list(values.values())
        self._old_at, self._new_at = _pointers(self._old), _pointers(self._new)
        self._samples = Samples(self._new if samples else [])
        self._seen = False
        self._given: list[int] = []
        self._changes = self._changed()

    def tensor(self, name: str) -> Tensor:
        """The tensor of a name, as it was found."""
        return self._own[list(self.dense).index(name)]

    def unchanged(self) -> bool:
        """Whether the tensors are those that they were, and nobody else has changed them.

        A change through ``.data`` is not noticed.
        """
        return self._same() and self._changed() == self._changes

    def lies_at(self, dense: Sequence[Tensor]) -> bool:
        """Whether dense values, in the order of the names, are in the memory in which they were."""
        return _pointers(dense) == self._old_at

    def give(self) -> bool:
        """Give the tensors the other values, if they have their dense ones and these have not changed."""
        fits = self._same() and _pointers(self._own) == self._old_at and self._changed() == self._changes
        if fits:
            self._put(self._new)
            self._given = versions_of(self._own)
        return fits

    def untouched(self) -> bool:
        """Whether nothing shows that somebody has changed the tensors since they were given the other values."""
        self._seen = self._has_new()
        return self._seen and versions_of(self._own) == self._given and self._samples.unchanged()

    def doubt(self) -> None:
        """Let :meth:`take_back` look for itself, though :meth:`untouched` was called before."""
        self._seen = False

    def writes(self, name: str) -> int | None:
        """How often a tensor was written since; ``None`` where it does not have the other value's memory any more."""
        at = list(self.dense).index(name)
        tensor = self._own[at]
        return tensor._version - self._given[at] if tensor.data_ptr() == self._new_at[at] else None

    def take_back(self) -> bool:
        """Give the tensors their dense values, if they still have the others' memory."""
        fits, self._seen = self._seen or self._has_new(), False
        if fits:
            self._put(self._old)
        return fits

    def _has_new(self) -> bool:
        return self._same() and _pointers(self._own) == self._new_at

    def _put(self, values: Sequence[Tensor]) -> None:
        for own, value in zip(self._own, values, strict=True):
            own.data = value
        # a backward pass that would now see other values than it ought to is refused
        torch.autograd.graph.increment_version(self._own)
        self._ours.update(self.names)

    def _same(self) -> bool:
        held = itertools.chain.from_iterable(map(dict.values, self._tables))
        return sum(map(len, self._tables)) == len(self._held) and all(map(operator.is_, held, self._held))

    def _changed(self) -> int:
        """How often others have changed the tensors, all together: each one's count can only grow."""
        return sum(map(_version, self._own)) - sum(map(self._ours.__getitem__, self.dense))


class Statistics:
    """A subnetwork's batch-norm statistics, made ready.

    Args:
        swap: Values for the model's batch-norm buffers.
        made_of: The subnetwork's own by name, of which they were made.
    """

    def __init__(self, swap: Swap, made_of: Mapping[str, Tensor]) -> None:
        self.swap = swap
        self._names, self._tensors = list(made_of), list(made_of.values())
        self._versions = sum(map(_version, self._tensors))

    def made_of(self, statistics: Mapping[str, Tensor]) -> bool:
        """Whether it was these, and they have not changed since."""
        return (
            list(statistics) == self._names
            and all(map(operator.is_, statistics.values(), self._tensors))
            and sum(map(_version, self._tensors)) == self._versions
        )


@dataclass(frozen=True)
class Ready:
    """What was made ready of a subnetwork.

    Attributes:
        weights: All that it masks, batch-norm buffers apart.
        statistics: The batch-norm buffers; ``None`` where they cannot be swapped.
    """

    weights: Swap
    statistics: Statistics | None


def _pointers(tensors: Sequence[Tensor]) -> list[int]:
    return list(map(Tensor.data_ptr, tensors))
