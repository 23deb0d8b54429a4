"""In-place writes into known tensors, undone: a tensor is copied when, and only when, it is about to be written."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["Writes", "is_plain"]

UNDECLARED = frozenset({"running_mean", "running_var"})
"""Arguments that old batch-norm kernels write though their schemas do not say so."""

SMALL = 1 << 16
"""Bytes of memory that is copied beforehand, unless it is a parameter's: counters and statistics.

While a model is traced, a tensor in a plain attribute is really written, at a point where nothing can be copied.
"""

Place = tuple[torch.device, int]
"""A tensor's memory."""

_PLAIN = frozenset({Tensor, nn.Parameter, nn.Buffer})


def is_plain(value: Tensor) -> bool:
    """Whether a tensor has memory of its own: no subclass, and no stand-in (fake, functional, distributed)."""
    return type(value) in _PLAIN and value.layout == torch.strided


class Writes:
    """Inside, each of some tensors is copied before the first operation that writes it.

    Buffers can be large (a cache for 128 k positions), and almost none are written, so copying all of them beforehand
    would double a model's memory. A dispatch mode sees every operation, also those of hooks; only writes past PyTorch
    (through ``tensor.numpy()``) and by code that was compiled escape it.

    Args:
        tensors: The tensors. They must stay alive, with the memory they have now.
        watch: Whether to watch operations, which costs each some microseconds. Without, all tensors but parameters are
            copied beforehand, and writes into parameters are not seen.
    """

    def __init__(self, tensors: Iterable[Tensor], *, watch: bool = True) -> None:
        self._watched = watch
        self._known: set[Place] = set()
        self._saved: dict[Place, tuple[Tensor, Tensor]] = {}
        self._small: set[Place] = set()
        self._raw: dict[Place, tuple[torch.UntypedStorage, bytes]] = {}
        for tensor in tensors:
            place = _place(tensor)
            if place is None or place in self._known:
                continue
            self._known.add(place)
            small = not watch or tensor.untyped_storage().nbytes() <= SMALL
            if small and not isinstance(tensor, nn.Parameter):
                memory = _memory(tensor)
                self._saved[place] = (memory, memory.clone())
                self._small.add(place)
        self._changed: set[Place] = set()  # since the last undo
        self._undoing = False
        self._stack = ExitStack()

    def __enter__(self) -> Writes:
        if not self._watched:
            return self
        outer: _Watch | None = getattr(_local, "watch", None)
        if outer is None:  # one mode for all that are nested: each would cost every operation the same again
            outer = _local.watch = _Watch()
            self._stack.callback(setattr, _local, "watch", None)
            self._stack.enter_context(outer)
        outer.listeners.append(self)
        self._stack.callback(outer.listeners.remove, self)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def before(self, value: Tensor) -> None:
        """Copy a tensor that is about to be written."""
        place = _place(value)
        if place is None or place not in self._known or self._undoing:
            return
        if place not in self._saved:
            try:
                memory = _memory(value)
                copied = memory.clone()
            except RuntimeError:  # inside a fake tensor's kernel, where operations are redirected to meta tensors
                self._save_raw(place, value)
                return
            if copied.device != value.device:  # the same
                self._save_raw(place, value)
                return
            self._saved[place] = (memory, copied)
        self._changed.add(place)

    def _save_raw(self, place: Place, value: Tensor) -> None:
        """Copy memory where no operation of PyTorch can: while a model is traced, tensors in plain attributes are."""
        if value.device.type == "cpu" and place not in self._raw:
            storage = value.untyped_storage()
            self._raw[place] = storage, ctypes.string_at(place[1], storage.nbytes())

    def undo(self) -> bool:
        """Put the values back that were there at first, and say whether there was anything to undo."""
        raw = False
        for place, (_, saved) in self._raw.items():
            if place not in self._saved and ctypes.string_at(place[1], len(saved)) != saved:
                ctypes.memmove(place[1], saved, len(saved))
                raw = True
        small = {place for place in self._small if not torch.equal(*self._saved[place])}
        changed, self._changed, self._undoing = self._changed - self._small | small, set(), True
        try:
            with torch.no_grad():
                for place in changed:
                    memory, value = self._saved[place]
                    memory.copy_(value)
        finally:
            self._undoing = False
        return raw or bool(changed)


class _Watch(TorchDispatchMode):
    """Reports every write that is about to happen in this thread."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.listeners: list[Writes] = []

    @classmethod
    def is_infra_mode(cls) -> bool:
        """It only looks on, so ``torch.export`` and higher-order operators need not care."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for value in _written(func, args, kwargs):
            for writes in self.listeners:
                writes.before(value)
        return func(*args, **kwargs)


_local = threading.local()


def _memory(value: Tensor) -> Tensor:
    """All of a tensor's memory, as bytes."""
    return torch.empty(0, dtype=torch.uint8, device=value.device).set_(value.untyped_storage())


def _place(value: Tensor) -> Place | None:
    if not is_plain(value) or value.is_meta:
        return None
    try:
        address = value.untyped_storage().data_ptr()
    except RuntimeError:  # a wrapper of functionalization, which has no memory
        return None
    return (value.device, address) if address else None


@cache
def _writers(func: Any) -> tuple[tuple[tuple[int, str], ...], int | None]:
    """Position and name of each argument that an operation writes.

    Also the position of the argument that says whether a norm updates its statistics, if there is one.
    """
    # A higher-order operator has no schema; what runs inside comes here by itself.
    arguments = getattr(getattr(func, "_schema", None), "arguments", ())
    writers = tuple(
        (i, a.name)
        for i, a in enumerate(arguments)
        if (a.alias_info is not None and a.alias_info.is_write) or a.name in UNDECLARED
    )
    return writers, next((i for i, a in enumerate(arguments) if a.name == "training"), None)


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Tensor]:
    writers, training = _writers(func)
    if training is not None and not (args[training] if training < len(args) else kwargs.get("training")):
        return
    for i, name in writers:
        value = args[i] if i < len(args) else kwargs.get(name)
        for leaf in (value,) if isinstance(value, Tensor) else tree_leaves(value):
            if isinstance(leaf, Tensor):
                yield leaf
