"""Masks applied in place, and dense values restored bit for bit."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .placed import Placed, zero_masked
from .sharding import is_sharded, local, rows_of, whole
from .statistics import batch_norm_buffers

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Ready:
    """A subnetwork's weights, made before they are needed.

    Attributes:
        values: By name, the tensors that it masks.
        states: By name, what tells whether the dense tensors have changed since.
        norms: Masks of batch-norm buffers, in their dtypes.
    """

    values: Mapping[str, Tensor]
    states: Mapping[str, tuple[Any, ...]]
    norms: Mapping[str, Tensor]


class Tensors:
    """A model's own parameters and buffers by name, found without walking the model each time."""

    def __init__(self, model: nn.Module) -> None:
        self.where: dict[str, tuple[dict[str, Tensor], str]] = {}
        for path, module in model.named_modules():
            for table in (module._parameters, module._buffers):
                for name, t in table.items():
                    if t is not None:
                        self.where[f"{path}.{name}".lstrip(".")] = (table, name)

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

    def __init__(self) -> None:
        self.saved: dict[str, Tensor] = {}
        self._lent: set[str] = set()  # those that have other memory for a while
        self._spare: dict[str, Tensor] = {}
        self._kept = False

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

    def lend(self, tensors: Tensors, values: Mapping[str, Tensor], *, keep: bool) -> None:
        """Give tensors memory with other values for a while; only once everything before was restored.

        Args:
            tensors: The model's.
            values: By name, like the tensors.
            keep: Whether they are somebody's who keeps them; else this stash has them.
        """
        self._kept = keep
        with _in_place():
            for n, value in values.items():
                self.saved[n] = tensors[n].detach()
                self._lent.add(n)
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


class Switcher:
    """Makes one subnetwork at a time the active one, in place.

    Weights and batch-norm buffers switch apart, since masked training shares the latter.
    """

    def __init__(self, model: nn.Module) -> None:
        self.tensors = Tensors(model)
        self.norm_buffers = frozenset(batch_norm_buffers(model))
        self.weights, self.norms = Stash(), Stash()
        self._ready: dict[str, Ready] = {}
        self._swappable: tuple[tuple[int, ...], bool] | None = None
        self._ours: dict[str, int] = {}  # how often a tensor's version went up because of us

    def to_dense(self, *, statistics: bool) -> None:
        """Restore the dense weights, and the dense statistics if asked."""
        with self._counted(list(self.weights.saved)):
            self.weights.restore(self.tensors)
        if statistics:
            self.norms.restore(self.tensors)

    def swap(self, ready: Ready) -> None:
        """Make weights that were made before the active ones. The dense ones are active."""
        with self._counted(list(ready.values)):
            self.weights.lend(self.tensors, ready.values, keep=True)

    def mask(self, masks: Placed) -> None:
        """Mask weights and other tensors, batch-norm buffers apart. The dense ones are active."""
        names = [n for n in masks if n not in self.norm_buffers]
        with self._counted(names):
            if self.swappable(names):
                self.weights.lend(self.tensors, self._masked(masks, names), keep=False)
            else:
                self.weights.save(self.tensors, names)
                zero_masked(masks, {n: self.tensors[n] for n in names})

    def prepare(self, name: str, masks: Placed) -> bool:
        """Make a subnetwork's weights beside the dense ones, so that making it active takes no time.

        Returns:
            Whether that is possible.
        """
        names = [n for n in masks if n not in self.norm_buffers]
        if not self.swappable(names):
            return False
        with _in_place():
            values = {n: torch.empty_like(self.tensors[n].detach()) for n in names}
            dense = {n: self.dense_part(n) for n in names}
            zero_masked(masks, dense, values)
        norms = {n: masks[n].to(self.tensors[n]) for n in masks if n in self.norm_buffers}
        self._ready[name] = Ready(values, {n: self._state(n) for n in names}, norms)
        return True

    def ready(self, name: str) -> Ready | None:
        """A subnetwork's weights that were made before; ``None`` where there are none that are still right."""
        ready = self._ready.get(name)
        if ready is None or all(self._state(n) == state for n, state in ready.states.items()):
            return ready
        log.info("%s is made ready no longer: the dense weights have changed since", name)
        del self._ready[name]
        return None

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

    def _state(self, name: str) -> tuple[Any, ...]:
        """What tells whether a tensor's dense value has changed, other than through ``.data``."""
        dense = self.dense_part(name)
        return dense.data_ptr(), dense.dtype, self.tensors[name]._version - self._ours.get(name, 0)

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
                self._ours[n] = self._ours.get(n, 0) + self.tensors[n]._version - version

    def load_statistics(self, statistics: Mapping[str, Tensor], masks: Placed) -> None:
        """Put a subnetwork's own statistics in the batch-norm buffers, masked where its channels are gone."""
        self.norms.save(self.tensors, [n for n in self.tensors.where if n in self.norm_buffers])
        names = [n for n in statistics if n in self.norm_buffers]
        if names:
            with _in_place():
                torch._foreach_copy_([self.tensors[n] for n in names], [statistics[n] for n in names])
        zero_masked(masks, {n: self.tensors[n] for n in masks if n in self.norm_buffers})

    def dense(self, name: str) -> Tensor:
        """A tensor's dense value, whatever is active; of a sharded one all of it, gathered by all processes."""
        given = self.tensors.given(name)
        if is_sharded(given):
            return whole(given, self.dense_part(name))
        return self.dense_part(name)

    def dense_part(self, name: str) -> Tensor:
        """The part of a tensor's dense value that is here."""
        for stash in (self.weights, self.norms):
            if name in stash.saved:
                return stash.saved[name]
        return self.tensors[name].detach()

    def release(self) -> None:
        """Forget spare copies."""
        self.weights.release()
        self.norms.release()


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
