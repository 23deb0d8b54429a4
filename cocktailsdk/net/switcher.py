"""Makes one subnetwork at a time the active one, by masks applied in place or by preloaded memory."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..masks.device_cache import DeviceMasks, zero_masked
from ..utils.batchnorm import norm_buffers
from ..utils.fsdp import full_tensor, is_sharded
from .dense_backup import DenseBackup, writing
from .preloaded import MemorySwap, PreloadedSubnet, PreloadedValues
from .tensor_table import TensorTable

log = logging.getLogger(__name__)

__all__ = ["Switcher", "forget_derived"]


class Switcher:
    """Makes one subnetwork at a time the active one, in place.

    Weights and batch-norm buffers switch apart, because masked training shares the buffers between subnetworks.

    Args:
        model: The user's own.

    Attributes:
        tensors: Its parameters and buffers.
        norm_buffers: Names of the buffers of its norms that keep running statistics.
        weights: Dense values of all other tensors that the active subnetwork masks, or has private tensors for.
        norms: Dense values of the norm buffers while a subnetwork's own are in place.
    """

    def __init__(self, model: nn.Module) -> None:
        self.tensors = TensorTable(model)
        self.norm_buffers = frozenset(norm_buffers(model))
        # No samples of the norm buffers: forward passes write them, and their counters show that (write_policy.py).
        self.weights, self.norms = DenseBackup(samples=True), DenseBackup(samples=False)
        self._preloaded: dict[str, PreloadedSubnet] = {}
        self._swappable: tuple[tuple[int, ...], bool] | None = None  # the last answer of swappable(), by addresses
        self._own_writes: Counter[str] = Counter()  # by tensor, how often switching itself raised its version counter

    def __getstate__(self) -> dict[str, Any]:
        # Preloaded values and counts are about this model's very tensors; a copy has others.
        return {**self.__dict__, "_preloaded": {}, "_own_writes": Counter()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.weights.watch(self.tensors)
        self.norms.watch(self.tensors)

    def adopt_as_dense(self, weights: Sequence[str], statistics: Sequence[str]) -> None:
        """Make the current values of tensors those of the dense network."""
        self.weights.adopt(self.tensors, weights)
        self.norms.adopt(self.tensors, statistics)
        self._preloaded.clear()

    def abandon(self, stored_masks: Mapping[str, Tensor], private: Mapping[str, Tensor]) -> None:
        """Restore the tensors that were changed, though the model has other ones in their places now.

        Args:
            stored_masks: The active subnetwork's, on the CPU.
            private: Its private tensors.
        """

        def expected(name: str, dense: Tensor) -> Tensor:
            value = private.get(name, dense).to(dense.device, dense.dtype)
            keep = stored_masks.get(name)
            return value if keep is None else torch.where(keep.to(dense.device), value, torch.zeros_like(value))

        self.weights.abandon(expected)
        self.norms.abandon(None)
        self._preloaded.clear()

    def restore(self, backup: DenseBackup) -> None:
        """Restore the dense :attr:`weights`, or the dense statistics (:attr:`norms`)."""
        forget_derived()
        if not backup.swap_out():
            with self._count_own_writes(list(backup.values)):
                backup.restore(self.tensors)

    def mask(self, masks: DeviceMasks, private: Mapping[str, Tensor]) -> None:
        """Mask weights and other tensors, batch-norm buffers apart. The dense ones must be active.

        Args:
            masks: The subnetwork's.
            private: Its private tensors, to which its masks apply in place of the dense values.
        """
        names = self._switched(masks, private)
        forget_derived()
        with self._count_own_writes(names):
            if self.swappable(names):
                with writing():
                    values = self.weights.allocate(self.tensors, names)
                _fill(values, {n: self.tensors[n].detach() for n in names}, masks, private)
                self.weights.replace_memory(self.tensors, values)
            else:
                self.weights.save(self.tensors, names)
                with writing():
                    for n, value in private.items():
                        self.tensors[n].copy_(value)
                zero_masked(masks, {n: self.tensors[n] for n in names if n in masks})

    def _switched(self, masks: DeviceMasks, private: Mapping[str, Tensor]) -> list[str]:
        """Names of the tensors that get other values with a subnetwork, batch-norm buffers apart."""
        masked = [n for n in masks if n not in self.norm_buffers]
        return [*masked, *(n for n in private if n not in masks)]

    def load_statistics(self, statistics: Mapping[str, Tensor], masks: DeviceMasks) -> None:
        """Copy a subnetwork's own statistics into the batch-norm buffers, zero where its channels are removed."""
        buffers = [n for n in self.tensors.slots if n in self.norm_buffers]
        names = [n for n in statistics if n in self.norm_buffers]
        with self._count_own_writes(buffers):
            self.norms.save(self.tensors, buffers)
            if names:
                with writing():
                    torch._foreach_copy_([self.tensors[n] for n in names], [statistics[n] for n in names])
            zero_masked(masks, {n: self.tensors[n] for n in masks if n in self.norm_buffers})

    def swap_in_weights(self, name: str, private: Mapping[str, Tensor]) -> bool:
        """Make a subnetwork's preloaded weights the active ones. The dense ones must be active.

        Returns:
            Whether it has preloaded weights that are still right, computed with these private tensors.
        """
        preloaded = self._preloaded.get(name)
        if preloaded is None:
            return False
        if not (preloaded.weights.computed_from(private) and self.weights.swap_in(preloaded.weights.swap)):
            self._drop_outdated(name)
            return False
        forget_derived()
        return True

    def swap_in_statistics(self, name: str, statistics: Mapping[str, Tensor]) -> bool:
        """Make a subnetwork's preloaded statistics the active ones. The dense ones must be active.

        Returns:
            Whether it has preloaded statistics that are still right, computed from these.
        """
        subnet = self._preloaded.get(name)
        preloaded = None if subnet is None else subnet.statistics
        return preloaded is not None and preloaded.computed_from(statistics) and self.norms.swap_in(preloaded.swap)

    def preload(
        self, name: str, masks: DeviceMasks, statistics: Mapping[str, Tensor], private: Mapping[str, Tensor]
    ) -> None:
        """Compute a subnetwork's weights and statistics beside the dense ones, so that a switch only swaps memory.

        What was preloaded before and is still right is kept. Tensors that cannot be swapped are left alone.

        Args:
            name: The subnetwork.
            masks: Its masks on the model's device.
            statistics: Its own statistics, as far as it has any.
            private: Its private tensors.
        """
        preloaded = self.preloaded(name, private)
        if preloaded is None:
            weights = self._preload_tensors(self._switched(masks, private), masks, private)
            if weights is None:
                return
            preloaded = self._preloaded[name] = PreloadedSubnet(PreloadedValues(weights, private), None)
        own = preloaded.statistics
        if own is None or not (own.computed_from(statistics) and self._swap_current(own.swap)):
            swap = None
            # Inference tensors have no version counter, so a later write to them could not be detected.
            if not any(t.is_inference() for t in statistics.values()):
                buffers = [n for n in self.tensors.slots if n in self.norm_buffers]
                swap = self._preload_tensors(buffers, masks, statistics)
            own = None if swap is None else PreloadedValues(swap, statistics)
            self._preloaded[name] = dataclasses.replace(preloaded, statistics=own)

    def _preload_tensors(
        self, names: Sequence[str], masks: DeviceMasks, replacements: Mapping[str, Tensor]
    ) -> MemorySwap | None:
        """Masked values of tensors in memory of their own; ``None`` where they cannot be swapped.

        Args:
            names: Of the tensors.
            masks: The subnetwork's.
            replacements: By name, values to use in place of the dense ones.
        """
        if not self.swappable(names) or len({id(self.tensors[n]) for n in names}) < len(names):
            return None
        dense = {n: self.dense_part(n) for n in names}
        with writing():
            values = {n: torch.empty_like(dense[n]) for n in names}
        _fill(values, dense, masks, replacements)
        are_weights = self.norm_buffers.isdisjoint(names)
        return MemorySwap(self.tensors.slots, dense, values, self._own_writes, samples=are_weights)

    def preloaded(self, name: str, private: Mapping[str, Tensor]) -> PreloadedSubnet | None:
        """What is preloaded of a subnetwork; ``None`` if it has no preloaded weights that are still right.

        Args:
            name: The subnetwork.
            private: Its private tensors.
        """
        preloaded = self._preloaded.get(name)
        if preloaded is None:
            return None
        if preloaded.weights.computed_from(private) and self._swap_current(preloaded.weights.swap):
            return preloaded
        self._drop_outdated(name)
        return None

    def has_preloaded(self, name: str) -> bool:
        """Whether a subnetwork was preloaded, without a look at whether the values are still right."""
        return name in self._preloaded

    def _swap_current(self, swap: MemorySwap) -> bool:
        return swap.current() and swap.dense_at([self.dense_part(n) for n in swap.dense])

    def _drop_outdated(self, name: str) -> None:
        log.info("%s is no longer preloaded: the dense weights or its private tensors have changed since", name)
        del self._preloaded[name]

    def forget(self, names: Iterable[str]) -> None:
        """Drop what is preloaded of these subnetworks."""
        for name in names:
            self._preloaded.pop(name, None)

    def forget_all_but(self, names: Iterable[str]) -> None:
        """Drop what is preloaded of all other subnetworks."""
        self.forget(self._preloaded.keys() - set(names))

    def swappable(self, names: Sequence[str]) -> bool:
        """Whether the memory of tensors can be exchanged: plain ones on the CPU that share memory with no other.

        On an accelerator, writing them takes a millisecond or two, and CUDA graphs have their addresses built in.
        """
        if any(is_sharded(self.tensors.registered(n)) for n in names):
            return False
        addresses = tuple(self.tensors[n].data_ptr() for n in names)
        if self._swappable is None or self._swappable[0] != addresses:
            self._swappable = addresses, self._find_swappable(names)
        return self._swappable[1]

    def _find_swappable(self, names: Sequence[str]) -> bool:
        tensors = self.tensors
        for t in (tensors[n] for n in names):
            plain = type(t) in (Tensor, nn.Parameter) and t.device.type == "cpu" and t.layout == torch.strided
            if not plain or t.is_shared() or t.is_inference():
                return False
        # Two tensors in one storage: if one got other memory, the other would stay behind with the old values. A
        # storage is known by the address of its C++ object (`_cdata`), because data_ptr() is 0 for all empty ones.
        owners: dict[int, set[int]] = {}
        for n in tensors.slots:
            t = tensors[n]
            if type(t) in (Tensor, nn.Parameter):
                owners.setdefault(t.untyped_storage()._cdata, set()).add(id(t))
        return all(len(owners[tensors[n].untyped_storage()._cdata]) == 1 for n in names)

    @contextlib.contextmanager
    def _count_own_writes(self, names: Sequence[str]) -> Iterator[None]:
        """Count the writes inside this block as those of switching, so that preloaded values are not outdated by it."""
        if not self._preloaded:
            yield
            return
        before = {n: self.tensors[n]._version for n in names}
        try:
            yield
        finally:
            for n, version in before.items():
                self._own_writes[n] += self.tensors[n]._version - version

    def dense(self, name: str) -> Tensor:
        """A tensor's dense value, whatever is active. All processes must ask for a sharded one, which is gathered."""
        tensor = self.tensors.registered(name)
        if is_sharded(tensor):
            return full_tensor(tensor, self.dense_part(name))
        return self.dense_part(name)

    def dense_part(self, name: str) -> Tensor:
        """A tensor's dense value, whatever is active; of a sharded one, the local shard."""
        for backup in (self.weights, self.norms):
            if name in backup.values:
                return backup.values[name]
        return self.tensors[name].detach()


def _fill(
    values: Mapping[str, Tensor], dense: Mapping[str, Tensor], masks: DeviceMasks, replacements: Mapping[str, Tensor]
) -> None:
    """Write a subnetwork's values into new memory.

    Args:
        values: By name, the memory.
        dense: By the same names, the dense values.
        masks: The subnetwork's.
        replacements: By name, values to use in place of the dense ones.
    """
    with writing():
        # Masking writes dense values straight into the new memory; only the others are copied first.
        masked = {n: dense[n] for n in values if n in masks and n not in replacements}
        zero_masked(masks, masked, values)
        for n, value in values.items():
            if n not in masked:
                value.copy_(replacements.get(n, dense[n]))
        zero_masked(masks, {n: value for n, value in values.items() if n in masks and n in replacements})


def forget_derived() -> None:
    """Drop weights that ``torch.autocast`` has cast and that ``torch.nn.utils.parametrize.cached`` has computed.

    Both keep what they computed from a parameter until their context ends, and do not look at it again. Inside one
    context every subnetwork would otherwise compute with the weights of the first.
    """
    torch.clear_autocast_cache()
    # There is no public way to clear this one. Where torch has it no more, `test_net_caches.py` will say so.
    cache = getattr(parametrize, "_cache", None)
    if cache:
        cache.clear()
