"""Preloaded weights and statistics: computed ahead, so that a switch only exchanges the memory of tensors.

The time of such a switch is not that of bytes but of Python calls and of tensors touched. So everything that can be
found out ahead is in lists, and loops run in C where ``map`` and ``itertools`` allow it.
"""

from __future__ import annotations

import itertools
import operator
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .tensor_table import Slot
from .write_watch import ByteSamples, addresses_of, versions_of

__all__ = ["MemorySwap", "PreloadedSubnet", "PreloadedValues"]


class MemorySwap:
    """Preloaded values for some of a model's tensors.

    :meth:`swap_in` makes the tensors use the memory of these values (``tensor.data = value``). :meth:`swap_out` makes
    them use their own memory again, which has the dense values and was neither written nor copied.

    Args:
        slots: By name, where each tensor is.
        dense: By name, the dense values, in the tensor's own memory.
        values: By the same names in the same order, the values to preload, of the same shapes, strides and dtypes.
        own_writes: By name, how often switching itself raised a tensor's version counter; kept up to date here.
        samples: Whether to detect values that are written through ``.data`` while the tensors are swapped.

    Attributes:
        dense: As passed.
        names: Those of the tensors.
    """

    def __init__(
        self,
        slots: Mapping[str, Slot],
        dense: Mapping[str, Tensor],
        values: Mapping[str, Tensor],
        own_writes: Counter[str],
        *,
        samples: bool,
    ) -> None:
        self.dense = dict(dense)
        self.names = frozenset(dense)
        self._tensors = [slots[n][0][slots[n][1]] for n in dense]
        # Whole module tables rather than single slots: two C loops over them show any tensor that was replaced.
        self._tables = list({id(table): table for table, _ in map(slots.__getitem__, dense)}.values())
        self._entries = list(itertools.chain.from_iterable(map(dict.values, self._tables)))
        self._own_writes = own_writes
        self._dense, self._values = list(dense.values()), list(values.values())
        self._dense_at, self._values_at = addresses_of(self._dense), addresses_of(self._values)
        self._samples = ByteSamples(self._values if samples else [])
        self._checked = False  # untouched() has found the preloaded memory in place, so swap_out() need not look again
        self._versions_in: list[int] = []  # version counters right after swap_in()
        self._foreign_writes = self._count_foreign_writes()

    def tensor(self, name: str) -> Tensor:
        """The model's tensor of a name, as it was when the values were computed."""
        return self._tensors[list(self.dense).index(name)]

    def current(self) -> bool:
        """Whether the values are still right: same tensors, and nobody else has written the dense values.

        A write through ``.data`` is not detected.
        """
        return self._same_tensors() and self._count_foreign_writes() == self._foreign_writes

    def dense_at(self, dense: Sequence[Tensor]) -> bool:
        """Whether dense values, in the order of the names, are still in the memory in which they were."""
        return addresses_of(dense) == self._dense_at

    def swap_in(self) -> bool:
        """Make the tensors use the preloaded memory, if they use their own and the values are still right."""
        right = self.current() and addresses_of(self._tensors) == self._dense_at
        if right:
            self._set_memory(self._values)
            self._versions_in = versions_of(self._tensors)
        return right

    def untouched(self) -> bool:
        """Whether no write to the tensors was detected since :meth:`swap_in`."""
        self._checked = self._swapped()
        return self._checked and versions_of(self._tensors) == self._versions_in and self._samples.unchanged()

    def recheck(self) -> None:
        """Let :meth:`swap_out` look for itself, whatever :meth:`untouched` found before."""
        self._checked = False

    def write_count(self, name: str) -> int | None:
        """How often a tensor was written since :meth:`swap_in`; ``None`` if it does not use that memory any more."""
        i = list(self.dense).index(name)
        tensor = self._tensors[i]
        return tensor._version - self._versions_in[i] if tensor.data_ptr() == self._values_at[i] else None

    def swap_out(self) -> bool:
        """Make the tensors use their own memory again, if they still use the preloaded one."""
        swapped, self._checked = self._checked or self._swapped(), False
        if swapped:
            self._set_memory(self._dense)
        return swapped

    def _swapped(self) -> bool:
        return self._same_tensors() and addresses_of(self._tensors) == self._values_at

    def _set_memory(self, values: Sequence[Tensor]) -> None:
        for tensor, value in zip(self._tensors, values, strict=True):
            tensor.data = value
        # Assigning .data leaves the version counter alone. Raised by hand, it lets autograd refuse a backward pass
        # that saved these tensors and would now compute with other values.
        torch.autograd.graph.increment_version(self._tensors)
        self._own_writes.update(self.names)

    def _same_tensors(self) -> bool:
        entries = itertools.chain.from_iterable(map(dict.values, self._tables))
        # The lengths first: map() ends with the shorter of the two.
        return sum(map(len, self._tables)) == len(self._entries) and all(map(operator.is_, entries, self._entries))

    def _count_foreign_writes(self) -> int:
        """How often anybody but switching has written the tensors.

        One sum is enough: each counter only grows, so the sum is the same only if every one of them is.
        """
        return sum(versions_of(self._tensors)) - sum(map(self._own_writes.__getitem__, self.dense))


class PreloadedValues:
    """A subnetwork's preloaded weights or batch-norm statistics.

    Args:
        swap: Values for the model's tensors.
        source: The subnetwork's private tensors or own statistics by name, from which the values were computed.
    """

    def __init__(self, swap: MemorySwap, source: Mapping[str, Tensor]) -> None:
        self.swap = swap
        self._names, self._tensors = list(source), list(source.values())
        self._versions = sum(versions_of(self._tensors))

    def computed_from(self, source: Mapping[str, Tensor]) -> bool:
        """Whether these were the source, and were not written since."""
        return (
            list(source) == self._names
            and all(map(operator.is_, source.values(), self._tensors))
            and sum(versions_of(self._tensors)) == self._versions
        )


@dataclass(frozen=True)
class PreloadedSubnet:
    """What is preloaded of a subnetwork.

    Attributes:
        weights: All tensors that it masks or owns, batch-norm buffers apart.
        statistics: The batch-norm buffers; ``None`` where their memory cannot be exchanged.
    """

    weights: PreloadedValues
    statistics: PreloadedValues | None
