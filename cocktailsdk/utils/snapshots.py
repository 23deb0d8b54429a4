"""Snapshots of single objects: dictionaries, lists, sets, slots, cells, classes, globals, tensors.

A snapshot stores what its object contains when the snapshot is made. Calling the snapshot restores exactly these
contents, and returns whether anything had changed. An object that did not change is not written to, so that other
threads notice nothing.

No code of the user's runs: methods of the built-in base classes are called, whatever a subclass overrides.
"""

from __future__ import annotations

import gc
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from operator import is_
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .writes import is_plain

MISSING: Any = object()
"""Stands for no value."""


def _same(now: Iterable[Any], before: Iterable[Any]) -> bool:
    return all(map(is_, now, before))


class DictSnapshot:
    """A dictionary: a container, or the attributes of a module or an object."""

    def __init__(self, thing: dict[Any, Any]) -> None:
        self._thing = thing
        self._base: Any = OrderedDict if isinstance(thing, OrderedDict) else dict
        self.saved = self._now()

    def _now(self) -> dict[Any, Any]:
        if type(self._thing) is dict:
            return dict(self._thing)
        return {k: dict.__getitem__(self._thing, k) for k in list(self._base.__iter__(self._thing))}

    def __call__(self) -> bool:
        """Restore it."""
        thing, saved, base = self._thing, self.saved, self._base
        now = self._now()
        if len(now) == len(saved) and _same(now, saved) and _same(now.values(), saved.values()):
            return False
        for key in now:
            if key not in saved:
                base.__delitem__(thing, key)
        for key, value in saved.items():
            if now.get(key, MISSING) is not value:
                base.__setitem__(thing, key, value)
        if not _same(list(base.__iter__(thing)), saved):  # the order is an attribute too: state_dict() has it
            base.clear(thing)
            base.update(thing, saved)
        return True


class ItemsSnapshot:
    """A list, a set or a deque."""

    def __init__(self, thing: Any) -> None:
        self._thing = thing
        self._base = next(base for base in _FILL if issubclass(type(thing), base))
        self.saved: list[Any] = list(self._base.__iter__(thing))

    def __call__(self) -> bool:
        """Restore it."""
        order: Any = sorted if self._base is set else list  # the order of a set says nothing
        if order(map(id, self._base.__iter__(self._thing))) == order(map(id, self.saved)):
            return False
        self._base.clear(self._thing)
        _FILL[self._base](self._thing, self.saved)
        return True


_FILL: dict[Any, Callable[[Any, list[Any]], None]] = {list: list.extend, set: set.update, deque: deque.extend}
"""By class, what puts items in."""


class ArraySnapshot:
    """A numpy array, by value."""

    def __init__(self, thing: np.ndarray[Any, Any]) -> None:
        self._thing, self._saved = thing, thing.copy()

    def __call__(self) -> bool:
        """Restore it."""
        if not self._thing.flags.writeable or self._thing.tobytes() == self._saved.tobytes():
            return False
        self._thing[...] = self._saved
        return True


class BytesSnapshot:
    """A ``bytearray`` or an ``array.array``, by value."""

    def __init__(self, thing: Any) -> None:
        self._thing, self._saved = thing, thing[:]

    def __call__(self) -> bool:
        """Restore it."""
        if self._thing == self._saved:
            return False
        self._thing[:] = self._saved
        return True


class GeneratorSnapshot:
    """A random generator of PyTorch's."""

    def __init__(self, thing: torch.Generator) -> None:
        self._thing, self._saved = thing, thing.get_state()

    def __call__(self) -> bool:
        """Restore it."""
        if torch.equal(self._thing.get_state(), self._saved):
            return False
        self._thing.set_state(self._saved)
        return True


class AttributeSnapshot:
    """One attribute that is kept outside ``__dict__``.

    It is a slot, a module's class (lazy modules change theirs), or the contents of the cell that a function shares with
    the function around it (``nonlocal``).
    """

    def __init__(self, thing: Any, name: str) -> None:
        self._thing, self._name = thing, name
        self.saved = self._now()

    def _now(self) -> Any:
        try:
            return object.__getattribute__(self._thing, self._name)
        except (AttributeError, ValueError):  # a cell that nothing was assigned to yet has no contents
            return MISSING

    def __call__(self) -> bool:
        """Restore it."""
        if self._now() is self.saved:
            return False
        with suppress(AttributeError, TypeError):  # a read-only slot, which nobody can have changed for long
            if self.saved is MISSING:
                object.__delattr__(self._thing, self._name)
            else:
                object.__setattr__(self._thing, self._name, self.saved)
        return True


class GlobalsSnapshot:
    """Some names of a Python module's namespace.

    Attributes:
        names: The names; more may be added.
    """

    def __init__(self, thing: dict[str, Any]) -> None:
        self._thing, self.saved = thing, dict(thing)
        self.names: set[str] = set()

    def __call__(self) -> bool:
        """Restore it."""
        changed = [n for n in self.names if self._thing.get(n, MISSING) is not self.saved.get(n, MISSING)]
        for name in changed:
            if name in self.saved:
                self._thing[name] = self.saved[name]
            else:
                del self._thing[name]
        return bool(changed)


class ClassSnapshot:
    """A class's own attributes that are data."""

    def __init__(self, thing: type) -> None:
        self._thing = thing
        self.saved = self._now()

    def _now(self) -> dict[str, Any]:
        return {k: v for k, v in dict(vars(self._thing)).items() if not k.startswith(("__", "_abc_"))}

    def __call__(self) -> bool:
        """Restore it."""
        now = self._now()
        added = now.keys() - self.saved.keys()
        changed = [name for name, value in self.saved.items() if now.get(name, MISSING) is not value]
        with suppress(AttributeError, TypeError):  # a metaclass that forbids it forbade the change, too
            for name in added:
                type.__delattr__(self._thing, name)
            for name in changed:
                type.__setattr__(self._thing, name, self.saved[name])
        return bool(added or changed)


class CacheSnapshot:
    """What ``functools.lru_cache`` stores; a cache can only be cleared completely, and fills itself again.

    It is cleared if it gained arguments or results that hold tensors or modules. Others are harmless.
    """

    def __init__(self, thing: Any) -> None:
        self._thing, self.saved = thing, _entries(thing)

    def __call__(self) -> bool:
        """Restore it."""
        before = {id(v) for v in self.saved}
        if not any(id(v) not in before and _holds_tensors(v) for v in _entries(self._thing)):
            return False
        self._thing.cache_clear()
        return True


def _entries(cache: Any) -> list[Any]:
    """Arguments and results that a cache stores. ``lru_cache`` has no way to list them; the garbage collector has."""
    out: list[Any] = []
    for value in gc.get_referents(cache):
        out += [*value.keys(), *value.values()] if type(value) is dict else [value]
    return [v for v in out if v is not cache.__wrapped__]  # the cached function is a referent too


def _holds_tensors(value: Any) -> bool:
    leaves = tree_leaves([list(value), list(value.values())] if type(value) is dict else value)
    leaves += [value for leaf in leaves for value in getattr(leaf, "__dict__", {}).values()]
    return any(isinstance(leaf, Tensor | nn.Module) for leaf in leaves)


class TensorSnapshot:
    """A tensor's memory, shape and flags; of its values, see :class:`cocktailsdk.utils.writes.Writes`."""

    def __init__(self, thing: Tensor) -> None:
        self.tensor, self._leaf = thing, thing.is_leaf
        self._memory = thing.data if is_plain(thing) else None
        self._requires_grad = thing.requires_grad
        self._grad = thing.grad if self._leaf else None

    def ignore_memory(self) -> None:
        """Restore only the flags, since something else restores the memory."""
        self._memory = None

    def __call__(self) -> bool:
        """Restore it."""
        thing, changed = self.tensor, False
        if self._memory is not None and not _same_view(thing, self._memory):
            thing.data, changed = self._memory, True
        if self._leaf and thing.requires_grad != self._requires_grad:
            thing.requires_grad_(self._requires_grad)
            changed = True
        if self._leaf and thing.grad is not self._grad:
            thing.grad, changed = self._grad, True
        return changed


def same_layout(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors differ in nothing but their memory and its contents."""
    return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device and a.stride() == b.stride()


def _same_view(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same view of the same memory."""
    return same_layout(a, b) and (a.is_meta or a.data_ptr() == b.data_ptr())
