"""Dense values of the tensors that a mask has changed, and how they come back bit for bit."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

import torch
from torch import Tensor

from ..utils.snapshots import same_layout
from .preloaded import MemorySwap
from .tensor_table import TensorTable
from .write_watch import WriteWatch, same_values

__all__ = ["DenseBackup", "writing"]


class DenseBackup:
    """Dense values of the tensors that a mask has changed.

    Masked training, evaluation and deployment share one mechanism: the model's own tensors get other values, and their
    dense values back. So the model keeps its class, its parameters their identity, and a compiled model stays compiled.

    There are three ways to give tensors other values:

    - :meth:`save` copies the dense values; the caller then overwrites the tensors.
    - :meth:`replace_memory` makes the tensors use newly computed memory; their own memory keeps the dense values.
    - :meth:`swap_in` makes them use preloaded memory.

    The memory used for it is kept for the next time until :meth:`release`; it is as large as the tensors changed.

    Args:
        samples: Whether to detect values that are written through ``.data``.

    Attributes:
        values: By name, the dense values of the tensors that have others now.
    """

    def __init__(self, *, samples: bool) -> None:
        self.values: dict[str, Tensor] = {}
        self._replaced: AbstractSet[str] = set()  # names of tensors that use other memory than their own now
        self._spare: dict[str, Tensor] = {}  # memory of the previous time, by name
        self._preloaded = False  # whether that memory is a swap's: it never becomes spare memory
        self._swap: MemorySwap | None = None  # the preloaded values that are in place
        self._watch: WriteWatch | None = None
        self._samples = samples

    def swap_in(self, swap: MemorySwap) -> bool:
        """Give tensors preloaded values if these are still right. Everything before must have been restored."""
        # The state is set first: if Ctrl-C comes between two tensors, restore() still knows all of them.
        self.values, self._replaced, self._preloaded, self._swap = swap.dense, swap.names, True, swap
        with writing():
            if swap.swap_in():
                return True
        self._clear()
        return False

    def swap_out(self) -> bool:
        """Undo :meth:`swap_in` if the tensors still use the preloaded memory.

        Returns:
            Whether all dense values are back; otherwise :meth:`restore` must follow.
        """
        swap, self._swap, self._watch = self._swap, None, None
        if swap is None:
            return not self.values
        with writing():
            if not swap.swap_out():
                return False
        self._clear()
        return True

    def _clear(self) -> None:
        self.values, self._replaced, self._preloaded, self._swap, self._watch = {}, set(), False, None, None

    def watch(self, tensors: TensorTable) -> None:
        """Record the state of the changed tensors, to detect writes by others later."""
        # A swap records its own state.
        watched = self._swap is None and bool(self.values)
        self._watch = WriteWatch(tensors.slots, list(self.values), samples=self._samples) if watched else None

    def untouched(self) -> bool:
        """Whether no write by others to the changed tensors was detected."""
        watch = self._watch if self._swap is None else self._swap
        return watch is None or watch.untouched()

    def recheck(self) -> None:
        """Let :meth:`swap_out` look at the tensors again, whatever :meth:`untouched` found before."""
        if self._swap is not None:
            self._swap.recheck()

    @property
    def swapped(self) -> bool:
        """Whether the tensors use preloaded memory."""
        return self._swap is not None

    def write_count(self, name: str) -> int | None:
        """How often others have written a tensor in place; ``None`` where that is not known."""
        watch = self._watch if self._swap is None else self._swap
        return None if watch is None else watch.write_count(name)

    def adopt(self, tensors: TensorTable, names: Iterable[str]) -> None:
        """Make the current values of tensors their dense values."""
        with writing():
            for n in names:
                now, dense = tensors[n].detach(), self.values[n]
                if same_layout(now, dense):
                    dense.copy_(now)
                else:
                    self.values[n] = now.clone()

    def abandon(self, masked: Callable[[str, Tensor], Tensor] | None) -> None:
        """Restore the tensors that were changed, though the model may have other ones in their places by now.

        Args:
            masked: The value a tensor should have, from its name and dense value. Tensors with another value were
                written by somebody and keep it. ``None`` restores all.
        """
        with writing():
            for n, dense in self.values.items():
                t = None if self._watch is None else self._watch.tensors.get(n)
                if self._swap is not None:
                    t = self._swap.tensor(n)
                if t is None or not same_layout(t, dense):
                    continue
                if masked is None or same_values(t.detach(), masked(n, dense)):
                    _set_memory(t, dense)
        self._clear()

    def restore(self, tensors: TensorTable) -> None:
        """Restore the dense values."""
        copied = []
        with writing():
            for n, dense in self.values.items():
                t = tensors[n]
                if n in self._replaced and same_layout(t, dense):
                    if not self._preloaded:
                        self._spare[n] = t.data
                    _set_memory(t, dense)
                else:  # saved as a copy, or the model has moved to another dtype or device since
                    copied.append(n)
            if copied:
                torch._foreach_copy_([tensors[n] for n in copied], [self.values[n] for n in copied])
                if not self._preloaded:
                    self._spare.update((n, self.values[n]) for n in copied)
        self._clear()

    def save(self, tensors: TensorTable, names: Sequence[str]) -> None:
        """Copy the values of tensors. Everything before must have been restored."""
        sources: list[Tensor] = []
        copies: list[Tensor] = []
        with writing():
            for n in names:
                t, spare = tensors[n], self._spare.pop(n, None)
                if spare is None or not same_layout(spare, t):
                    self.values[n] = t.detach().clone()
                else:
                    self.values[n] = spare
                    sources.append(t.detach())
                    copies.append(spare)
            if copies:
                torch._foreach_copy_(copies, sources)

    def replace_memory(self, tensors: TensorTable, values: Mapping[str, Tensor]) -> None:
        """Make tensors use the memory of other values until :meth:`restore`. Everything before must have been restored.

        Args:
            tensors: The model's.
            values: By name, each of the tensor's shape, strides, dtype and device. They belong to this backup then.
        """
        replaced: set[str] = set()
        self._replaced = replaced
        with writing():
            for n, value in values.items():
                # Recorded before the tensor changes: whatever interrupts the loop, restore() undoes what was done.
                self.values[n] = tensors[n].detach()
                replaced.add(n)
                _set_memory(tensors[n], value)

    def allocate(self, tensors: TensorTable, names: Sequence[str]) -> dict[str, Tensor]:
        """Uninitialized memory like these tensors', spare memory where it fits."""
        out = {}
        for n in names:
            spare, t = self._spare.pop(n, None), tensors[n].detach()
            out[n] = spare if spare is not None and same_layout(spare, t) else torch.empty_like(t)
        return out

    def release(self) -> None:
        """Free the spare memory."""
        self._spare = {}

    def __getstate__(self) -> dict[str, Any]:
        # A swap and a watch point to this model's tensors; a copy has others, and restores from `values`.
        return {**self.__dict__, "_swap": None, "_watch": None}


@contextlib.contextmanager
def writing() -> Iterator[None]:
    """A block that writes tensors of the model."""
    # Tensors made in inference mode can never be written in place outside of it, so it is off even where the caller
    # has turned it on.
    with torch.inference_mode(False), torch.no_grad():
        yield


def _set_memory(tensor: Tensor, value: Tensor) -> None:
    """Make a tensor use the memory of another value."""
    tensor.data = value
    # Assigning .data leaves the version counter alone. Raised by hand, it lets autograd refuse a backward pass that
    # saved this tensor and would now compute with other values.
    torch.autograd.graph.increment_version(tensor)
