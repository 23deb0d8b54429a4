"""Masks applied in place, and dense values restored bit for bit."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..masks.device_cache import Placed, zero_masked
from ..utils.fsdp import full_tensor, is_sharded, local, rows_of
from ..utils.norms import norm_buffers
from ..utils.weight_caches import forget_derived
from .edits import Watch, same_values
from .preloaded import Ready, Statistics, Swap
from .structure import Structure

log = logging.getLogger(__name__)


class Tensors:
    """A model's own parameters and buffers by name, found without walking the model each time."""

    def __init__(self, model: nn.Module) -> None:
        self._model, self._structure = model, Structure(model)
        self.where = self._found()

    def _found(self) -> dict[str, tuple[dict[str, Tensor], str]]:
        where: dict[str, tuple[Any, str]] = {}
        for path, module in self._model.named_modules():
            for table in (module._parameters, module._buffers):
                for name, t in table.items():
                    if t is not None:
                        where[f"{path}.{name}".lstrip(".")] = (table, name)
        return where

    def module(self, path: str) -> nn.Module:
        """The module at a path."""
        return self._model.get_submodule(path)

    def check(self) -> None:
        """See that the model still has the modules and parameters that it had.

        Raises:
            CocktailError: It has not; says what differs.
        """
        if self._structure.check():
            self.where = self._found()

    def __getitem__(self, name: str) -> Tensor:
        """The tensor; of a sharded one what is here."""
        return local(self.given(name))

    def given(self, name: str) -> Tensor:
        """The tensor as the module has it."""
        table, key = self.where[name]
        return table[key]

    def part(self, name: str, mask: Tensor) -> Tensor:
        """Of what broadcasts to a tensor, what broadcasts to the part that is here."""
        given = self.given(name)
        if not is_sharded(given) or mask.ndim < given.ndim or mask.shape[0] != given.shape[0]:
            return mask
        return mask[rows_of(given)]

    @property
    def sharded(self) -> bool:
        """Whether there are sharded ones."""
        return any(is_sharded(table[key]) for table, key in self.where.values())

    def __contains__(self, name: str) -> bool:
        return name in self.where


class Stash:
    """Dense values of the tensors that a mask has changed.

    One mechanism serves masked training, evaluation and deployment: the model's own tensors get other values, and their
    dense values back. So the model keeps its class, its parameters their identity, and a compiled model stays compiled.

    Either the dense values are copied aside, and other values written in their place; or, where that is possible
    (:meth:`Switcher.swappable`), the tensors are given memory with other values for a while, and the memory that holds
    the dense values is left alone. What was used for it is kept for the next time unless released; it is as large as
    the tensors touched.
    """

    def __init__(self, *, samples: bool) -> None:
        self.saved: dict[str, Tensor] = {}
        self._lent: AbstractSet[str] = set()  # those that have other memory for a while
        self._spare: dict[str, Tensor] = {}
        self._kept = False
        self._swap: Swap | None = None
        self._watch: Watch | None = None
        self._samples = samples

    def swap(self, swap: Swap) -> bool:
        """Give tensors values that were made before, if these are still right; once everything before was restored."""
        self.saved, self._lent, self._kept, self._swap = swap.dense, swap.names, True, swap
        with _in_place():
            if swap.give():
                return True
        self.saved, self._lent, self._kept, self._swap = {}, set(), False, None
        return False

    def swapped_back(self) -> bool:
        """Undo :meth:`swap`, if that was what was done and the tensors are as it left them."""
        swap, self._swap, self._watch = self._swap, None, None
        if swap is None:
            return not self.saved
        with _in_place():
            if not swap.take_back():
                return False
        self.saved, self._lent, self._kept = {}, set(), False
        return True

    def watch(self, tensors: Tensors) -> None:
        """Note what the changed tensors are now, to tell later whether somebody else has changed them."""
        watched = self._swap is None and bool(self.saved)
        self._watch = Watch(tensors.where, list(self.saved), samples=self._samples) if watched else None

    def untouched(self) -> bool:
        """Whether nothing shows that somebody else has changed the tensors that this stash holds dense values of."""
        seen = self._watch if self._swap is None else self._swap
        return seen is None or seen.untouched()

    def doubt(self) -> None:
        """What :meth:`untouched` saw may be so no longer."""
        if self._swap is not None:
            self._swap.doubt()

    @property
    def swapped(self) -> bool:
        """Whether the tensors have memory that was prepared, and is to be used again."""
        return self._swap is not None

    def writes(self, name: str) -> int | None:
        """How often somebody has written one of them in place; ``None`` where that is not known."""
        seen = self._watch if self._swap is None else self._swap
        return None if seen is None else seen.writes(name)

    def become(self, tensors: Tensors, names: Iterable[str]) -> None:
        """Take the values that tensors have now for their dense ones."""
        with _in_place():
            for n in names:
                now, dense = tensors[n].detach(), self.saved[n]
                if _alike(now, dense):
                    dense.copy_(now)
                else:
                    self.saved[n] = now.clone()

    def abandon(self, masked: Callable[[str, Tensor], Tensor] | None) -> None:
        """Give the tensors themselves their dense values, wherever the model has them now.

        Args:
            masked: From a name and its dense value what a tensor should have; those that have something else keep it.
        """
        with _in_place():
            for n, dense in self.saved.items():
                t = None if self._watch is None else self._watch.tensors.get(n)
                if self._swap is not None:
                    t = self._swap.tensor(n)
                if t is None or not _alike(t, dense):
                    continue
                if masked is None or same_values(t.detach(), masked(n, dense)):
                    _give(t, dense)
        self.saved, self._lent, self._kept, self._swap, self._watch = {}, set(), False, None, None

    def restore(self, tensors: Tensors) -> None:
        """Give the dense values back."""
        copied = []
        with _in_place():
            for n, dense in self.saved.items():
                t = tensors[n]
                if n in self._lent and _alike(t, dense):
                    if not self._kept:
                        self._spare[n] = t.data
                    _give(t, dense)
                else:  # the model has changed its dtype or device since
                    copied.append(n)
            if copied:
                torch._foreach_copy_([tensors[n] for n in copied], [self.saved[n] for n in copied])
                if not self._kept:
                    self._spare.update((n, self.saved[n]) for n in copied)
        self.saved, self._lent, self._kept = {}, set(), False

    def save(self, tensors: Tensors, names: Sequence[str]) -> None:
        """Copy the values of these tensors aside; only once everything before was restored."""
        own: list[Tensor] = []
        old: list[Tensor] = []
        with _in_place():
            for n in names:
                t, spare = tensors[n], self._spare.pop(n, None)
                if spare is None or not _alike(spare, t):
                    self.saved[n] = t.detach().clone()
                else:
                    self.saved[n] = spare
                    own.append(t.detach())
                    old.append(spare)
            if old:
                torch._foreach_copy_(old, own)

    def lend(self, tensors: Tensors, values: Mapping[str, Tensor]) -> None:
        """Give tensors memory with other values for a while, which this stash then has.

        Args:
            tensors: The model's; everything before was restored.
            values: By name, like the tensors.
        """
        lent: set[str] = set()
        self._lent = lent
        with _in_place():
            for n, value in values.items():
                self.saved[n] = tensors[n].detach()
                lent.add(n)
                _give(tensors[n], value)

    def room(self, tensors: Tensors, names: Sequence[str]) -> dict[str, Tensor]:
        """Memory for values of these tensors, taken from what is spare where that fits."""
        out = {}
        for n in names:
            spare, t = self._spare.pop(n, None), tensors[n].detach()
            out[n] = spare if spare is not None and _alike(spare, t) else torch.empty_like(t)
        return out

    def release(self) -> None:
        """Forget the copies that are not in use."""
        self._spare = {}

    def __getstate__(self) -> dict[str, Any]:
        # a copy restores what was saved; its tensors are others
        return {**self.__dict__, "_swap": None, "_watch": None}


class Switcher:
    """Makes one subnetwork at a time the active one, in place.

    Weights and batch-norm buffers switch apart, since masked training shares the latter.
    """

    def __init__(self, model: nn.Module) -> None:
        self.tensors = Tensors(model)
        self.norm_buffers = frozenset(norm_buffers(model))
        # what forward passes write to running statistics shows in their counters
        self.weights, self.norms = Stash(samples=True), Stash(samples=False)
        self._ready: dict[str, Ready] = {}
        self._swappable: tuple[tuple[int, ...], bool] | None = None
        self._ours: Counter[str] = Counter()  # how often a tensor's version went up because of us

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_ready": {}, "_ours": Counter()}  # they are of these very tensors

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.watch()

    def watch(self) -> None:
        """Note what the tensors are that differ from the dense ones now."""
        self.weights.watch(self.tensors)
        self.norms.watch(self.tensors)

    def changed_weights(self, masks: Placed) -> list[str]:
        """Names of tensors that somebody has changed since a subnetwork's weights became the active ones.

        Args:
            masks: The subnetwork's.
        """

        def as_masked(name: str) -> bool:
            now = self.tensors[name].detach()
            value = self.weights.saved[name].to(now.device, now.dtype, copy=True)
            zero_masked(masks, {name: value})
            return same_values(value, now)

        return [n for n in self.weights.saved if not as_masked(n)]

    def changed_statistics(self, statistics: Mapping[str, Tensor], masks: Placed) -> list[str]:
        """The same of norms' buffers.

        Args:
            statistics: The subnetwork's own.
            masks: Its own.
        """
        out = []
        for name, dense in self.norms.saved.items():
            now = self.tensors[name].detach()
            value = statistics.get(name, dense).to(now.device, now.dtype, copy=True)
            if name in masks:
                zero_masked(masks, {name: value})
            if not same_values(value, now):
                out.append(name)
        return out

    def trained_statistics(self, path: str) -> bool:
        """Whether all that changed a norm's buffers were forward passes in train mode."""
        mean, var = (self.norms.writes(f"{path}.{n}".lstrip(".")) for n in ("running_mean", "running_var"))
        if mean is None or var is None:
            return False
        counter = f"{path}.num_batches_tracked".lstrip(".")
        if counter not in self.norms.saved or not isinstance(self.tensors.module(path), _BatchNorm):
            return mean == var  # instance norms do not count
        passes = int(self.tensors[counter]) - int(self.norms.saved[counter])
        # torch does not count what a batch norm itself writes to its statistics
        return passes == self.norms.writes(counter) and {mean, var} <= {0, passes}

    def become_dense(self, weights: Sequence[str], statistics: Sequence[str]) -> None:
        """Take the values that tensors have now for the dense network's."""
        self.weights.become(self.tensors, weights)
        self.norms.become(self.tensors, statistics)
        self._ready.clear()

    def abandon(self, kept: Mapping[str, Tensor]) -> None:
        """Give the dense values back to the tensors that were changed, though the model has other ones now.

        Args:
            kept: The active subnetwork's masks, as they are stored.
        """

        def masked(name: str, dense: Tensor) -> Tensor:
            keep = kept[name].to(dense.device)
            return torch.where(keep, dense, torch.zeros_like(dense))

        self.weights.abandon(masked)
        self.norms.abandon(None)
        self._ready.clear()

    def to_dense(self, *, statistics: bool) -> None:
        """Restore the dense weights, and the dense statistics if asked."""
        self._restore(self.weights)
        if statistics:
            self.dense_statistics()

    def dense_statistics(self) -> None:
        """Restore the dense statistics."""
        self._restore(self.norms)

    def _restore(self, stash: Stash) -> None:
        forget_derived()
        if not stash.swapped_back():
            with self._counted(list(stash.saved)):
                stash.restore(self.tensors)

    def swap(self, name: str) -> bool:
        """Make a subnetwork's weights that were made before the active ones. The dense ones are active.

        Returns:
            Whether there were any that are still right.
        """
        ready = self._ready.get(name)
        if ready is None:
            return False
        if not self.weights.swap(ready.weights):
            self._outdated(name)
            return False
        forget_derived()
        return True

    def mask(self, masks: Placed) -> None:
        """Mask weights and other tensors, batch-norm buffers apart. The dense ones are active."""
        names = [n for n in masks if n not in self.norm_buffers]
        forget_derived()
        with self._counted(names):
            if self.swappable(names):
                self.weights.lend(self.tensors, self._masked(masks, names))
            else:
                self.weights.save(self.tensors, names)
                zero_masked(masks, {n: self.tensors[n] for n in names})

    def prepare(self, name: str, masks: Placed, statistics: Mapping[str, Tensor]) -> bool:
        """Make a subnetwork's weights and statistics beside the dense ones, so that making it active takes no time.

        What is still right of those that were made before is kept.

        Args:
            name: The subnetwork.
            masks: Its own.
            statistics: Its own, as far as it has any.

        Returns:
            Whether that is possible.
        """
        ready = self.ready(name)
        if ready is None:
            weights = self._prepared([n for n in masks if n not in self.norm_buffers], masks, {})
            if weights is None:
                return False
            ready = self._ready[name] = Ready(weights, None)
        if ready.statistics is None or not self._right(ready.statistics, statistics):
            made = None
            if not any(t.is_inference() for t in statistics.values()):  # whose changes nobody can notice
                made = self._prepared([n for n in self.tensors.where if n in self.norm_buffers], masks, statistics)
            made_of = None if made is None else Statistics(made, statistics)
            self._ready[name] = dataclasses.replace(ready, statistics=made_of)
        return True

    def _prepared(self, names: Sequence[str], masks: Placed, instead: Mapping[str, Tensor]) -> Swap | None:
        """Values of tensors made beside them: of others instead, masked; ``None`` where they cannot be swapped."""
        if not self.swappable(names) or len({id(self.tensors[n]) for n in names}) < len(names):
            return None
        dense = {n: self.dense_part(n) for n in names}
        with _in_place():
            values = {n: torch.empty_like(dense[n]) for n in names}
            masked = {n: dense[n] for n in names if n in masks and n not in instead}
            zero_masked(masks, masked, values)
            for n in names:
                if n not in masked:
                    values[n].copy_(instead.get(n, dense[n]))
            zero_masked(masks, {n: values[n] for n in names if n in masks and n in instead})
        weights = self.norm_buffers.isdisjoint(names)
        return Swap(self.tensors.where, dense, values, self._ours, samples=weights)

    def ready(self, name: str) -> Ready | None:
        """What was made before of a subnetwork; ``None`` where there are no weights that are still right."""
        ready = self._ready.get(name)
        if ready is None or self._unchanged(ready.weights):
            return ready
        self._outdated(name)
        return None

    def _unchanged(self, swap: Swap) -> bool:
        return swap.unchanged() and swap.lies_at([self.dense_part(n) for n in swap.dense])

    def _right(self, ready: Statistics, statistics: Mapping[str, Tensor]) -> bool:
        return ready.made_of(statistics) and self._unchanged(ready.swap)

    def _outdated(self, name: str) -> None:
        log.info("%s is made ready no longer: the dense weights have changed since", name)
        del self._ready[name]

    def forget(self, names: Iterable[str]) -> None:
        """Drop what was made ready of these subnetworks."""
        for name in names:
            self._ready.pop(name, None)

    @property
    def prepared(self) -> dict[str, Ready]:
        """What was made ready, by subnetwork."""
        return dict(self._ready)

    def swappable(self, names: Sequence[str]) -> bool:
        """Whether tensors can be given other memory: plain ones on the CPU that share theirs with no other.

        On an accelerator writing them anew takes no longer than a millisecond or two, and graphs of CUDA kernels hold
        their addresses.
        """
        if any(is_sharded(self.tensors.given(n)) for n in names):
            return False
        where = tuple(self.tensors[n].data_ptr() for n in names)
        if self._swappable is None or self._swappable[0] != where:
            self._swappable = where, self._can_be_swapped(names)
        return self._swappable[1]

    def _can_be_swapped(self, names: Sequence[str]) -> bool:
        tensors = self.tensors
        for t in (tensors[n] for n in names):
            plain = type(t) in (Tensor, nn.Parameter) and t.device.type == "cpu" and t.layout == torch.strided
            if not plain or t.is_shared() or t.is_inference():
                return False
        owners: dict[int, set[int]] = {}
        for n in tensors.where:
            t = tensors[n]
            if type(t) in (Tensor, nn.Parameter):
                owners.setdefault(t.untyped_storage()._cdata, set()).add(id(t))
        return all(len(owners[tensors[n].untyped_storage()._cdata]) == 1 for n in names)

    def _masked(self, masks: Placed, names: Sequence[str]) -> dict[str, Tensor]:
        with _in_place():
            values = self.weights.room(self.tensors, names)
            zero_masked(masks, {n: self.tensors[n] for n in names}, values)
        return values

    @contextlib.contextmanager
    def _counted(self, names: Sequence[str]) -> Iterator[None]:
        """Inside it is we who change tensors."""
        if not self._ready:
            yield
            return
        before = {n: self.tensors[n]._version for n in names}
        try:
            yield
        finally:
            for n, version in before.items():
                self._ours[n] += self.tensors[n]._version - version

    def swap_statistics(self, name: str, statistics: Mapping[str, Tensor]) -> bool:
        """Make a subnetwork's statistics that were made before the active ones. The dense ones are active.

        Returns:
            Whether there were any that are still right, made of these.
        """
        ready = self._ready.get(name)
        made = None if ready is None else ready.statistics
        return made is not None and made.made_of(statistics) and self.norms.swap(made.swap)

    def load_statistics(self, statistics: Mapping[str, Tensor], masks: Placed) -> None:
        """Put a subnetwork's own statistics in the batch-norm buffers, masked where its channels are gone."""
        buffers = [n for n in self.tensors.where if n in self.norm_buffers]
        names = [n for n in statistics if n in self.norm_buffers]
        with self._counted(buffers):
            self.norms.save(self.tensors, buffers)
            if names:
                with _in_place():
                    torch._foreach_copy_([self.tensors[n] for n in names], [statistics[n] for n in names])
            zero_masked(masks, {n: self.tensors[n] for n in masks if n in self.norm_buffers})

    def dense(self, name: str) -> Tensor:
        """A tensor's dense value, whatever is active; of a sharded one all of it, gathered by all processes."""
        given = self.tensors.given(name)
        if is_sharded(given):
            return full_tensor(given, self.dense_part(name))
        return self.dense_part(name)

    def dense_part(self, name: str) -> Tensor:
        """The part of a tensor's dense value that is here."""
        for stash in (self.weights, self.norms):
            if name in stash.saved:
                return stash.saved[name]
        return self.tensors[name].detach()

    def release(self) -> None:
        """Forget spare copies of weights; those of statistics are small, and make the next switch quicker."""
        self.weights.release()


@contextlib.contextmanager
def _in_place() -> Iterator[None]:
    # Not inference mode even where the caller is in it: tensors made there could not be changed outside later.
    with torch.inference_mode(False), torch.no_grad():
        yield


def _alike(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device and a.stride() == b.stride()


def _give(tensor: Tensor, value: Tensor) -> None:
    """Give a tensor other memory. A backward pass that would now see other values than it ought to is refused."""
    tensor.data = value
    torch.autograd.graph.increment_version(tensor)
