"""Masks applied in place, and dense values restored bit for bit."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from .placed import Placed, zero_masked
from .sharding import is_sharded, local, rows_of, whole
from .statistics import batch_norm_buffers


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

    One mechanism serves masked training, evaluation and deployment: keep the dense values of what is touched, change
    the model's own tensors in place, copy the values back. So the model keeps its class, its parameters their identity,
    and a compiled model stays compiled.

    The copies are kept for the next time unless released; they are as large as the tensors touched.
    """

    def __init__(self) -> None:
        self.saved: dict[str, Tensor] = {}
        self._spare: dict[str, Tensor] = {}

    def restore(self, tensors: Tensors) -> None:
        """Copy the dense values back."""
        if self.saved:
            with _in_place():
                torch._foreach_copy_([tensors[n] for n in self.saved], list(self.saved.values()))
        self._spare.update(self.saved)
        self.saved = {}

    def save(self, tensors: Tensors, names: Sequence[str]) -> None:
        """Keep the values of these tensors; only once everything before was restored."""
        own: list[Tensor] = []
        old: list[Tensor] = []
        with _in_place():
            for n in names:
                t, spare = tensors[n], self._spare.pop(n, None)
                if spare is None or spare.shape != t.shape or spare.dtype != t.dtype or spare.device != t.device:
                    self.saved[n] = t.detach().clone()
                else:
                    self.saved[n] = spare
                    own.append(t.detach())
                    old.append(spare)
            if old:
                torch._foreach_copy_(old, own)

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

    def to_dense(self, *, statistics: bool) -> None:
        """Restore the dense weights, and the dense statistics if asked."""
        self.weights.restore(self.tensors)
        if statistics:
            self.norms.restore(self.tensors)

    def mask(self, masks: Placed) -> None:
        """Mask weights and other tensors, batch-norm buffers apart. The dense ones are active."""
        names = [n for n in masks if n not in self.norm_buffers]
        self.weights.save(self.tensors, names)
        zero_masked(masks, {n: self.tensors[n] for n in names})

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
