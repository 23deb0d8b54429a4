"""Everything that running a model may change: what can be reached from it."""

from __future__ import annotations

import enum
import functools
import sys
import weakref
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .snapshots import (
    ArraySnapshot,
    AttributeSnapshot,
    BytesSnapshot,
    CacheSnapshot,
    ClassSnapshot,
    DictSnapshot,
    GeneratorSnapshot,
    GlobalsSnapshot,
    ItemsSnapshot,
    TensorSnapshot,
)

__all__ = ["Walk"]

DEEPEST = 8
"""Steps from a module through objects and containers that are no modules."""

NEAREST = 3
"""The same for functions and classes: code that a model's code calls, and what that calls, not all of a library."""

LONGEST = 10_000
"""Elements of a container beyond which only the container itself is restored (a vocabulary, a data set)."""

LARGEST_ARRAY = 1 << 20
"""Bytes of a numpy array that is saved by value."""

_ATOMS = frozenset(
    {bool, int, float, complex, str, bytes, type(None), ModuleType, torch.Size, torch.dtype, torch.device}
)
_LIBRARIES = (frozenset(sys.stdlib_module_names) - {"__main__", "collections", "types", "weakref"}) | {
    "torch",
    "numpy",
    "jaxtyping",
    "cocktailsdk",
}
"""Packages whose objects, classes and globals a model's forward pass does not change in a way that matters here."""

_LruCache: Any = type(lru_cache(lambda: None))
_CODE = frozenset({FunctionType, MethodType, functools.partial, _LruCache})
_Local = type(__import__("threading").local())
_ScriptModule: type = getattr(torch.jit, "ScriptModule", type(None))


class Walk:
    """Finds all that is reachable from some roots, and what it takes to put it back.

    Modules, containers, objects with attributes or slots, closures, default arguments, the globals that functions name,
    classes outside of libraries, and the caches of ``functools``.

    Args:
        roots: Modules, or anything else.
        beyond: Whether to look at what functions, methods and classes hold, too.

    Attributes:
        snapshots: One of each object found: restores it when called, and returns whether it had changed.
        tensors: The tensors found.
    """

    def __init__(self, roots: Iterable[Any], *, beyond: bool = True) -> None:
        self._beyond = beyond
        self.snapshots: list[Callable[[], bool]] = []
        self.tensors: list[Tensor] = []
        self._seen: dict[int, Any] = {}  # holds the objects, so that no id is used twice
        self._globals: dict[int, GlobalsSnapshot] = {}
        self._classes: set[type] = set()
        self._todo: list[tuple[Any, int]] = [(root, 0) for root in roots]
        while self._todo:
            value, depth = self._todo.pop()
            if type(value) in _ATOMS or id(value) in self._seen or depth > DEEPEST:
                continue
            self._seen[id(value)] = value
            self._visit(value, type(value), depth)

    def _push(self, values: Iterable[Any], depth: int) -> None:
        self._todo += [(v, depth) for v in values if type(v) not in _ATOMS]

    def _visit(self, value: Any, kind: type, depth: int) -> None:
        if issubclass(kind, Tensor):
            if not torch.nn.parameter.is_lazy(value):
                self.snapshots.append(TensorSnapshot(value))
                self.tensors.append(value)
                self._dict(vars(value), depth)
        elif issubclass(kind, nn.Module):
            self._module(value, kind)
        elif issubclass(kind, dict):
            self._dict(value, depth)
        elif issubclass(kind, list | set | deque):
            items = ItemsSnapshot(value)
            self._container(items, items.saved, depth)
        elif issubclass(kind, tuple | frozenset):
            if len(value) <= LONGEST:
                self._push(tuple(value), depth + 1)
        else:
            self._visit_other(value, kind, depth)

    def _visit_other(self, value: Any, kind: type, depth: int) -> None:
        if kind in _CODE and not self._beyond:
            return
        if kind is FunctionType:
            self._function(value, depth)
        elif kind is MethodType:
            self._push((value.__self__, value.__func__), depth)
        elif kind is CellType:
            cell = AttributeSnapshot(value, "cell_contents")
            self._container(cell, (cell.saved,), depth - 1)
        elif kind is functools.partial:
            self._push((value.func, value.args, value.keywords), depth)
        elif kind is _LruCache:
            cache = CacheSnapshot(value)
            self._container(cache, (*cache.saved, value.__wrapped__), depth)
        elif issubclass(kind, weakref.ReferenceType):
            self._push((value(),), depth)
        elif kind is np.ndarray:
            if value.nbytes <= LARGEST_ARRAY and value.dtype != object:
                self.snapshots.append(ArraySnapshot(value))
        elif kind in (bytearray, array):
            if len(value) <= LARGEST_ARRAY:
                self.snapshots.append(BytesSnapshot(value))
        elif kind is torch.Generator:
            self.snapshots.append(GeneratorSnapshot(value))
        elif kind is _Local:
            self._push((value.__dict__,), depth)  # this thread's
        elif issubclass(kind, type):
            if depth < NEAREST:
                self._object_class(value)
        elif not (_of_library(kind) or issubclass(kind, enum.Enum)):  # type: ignore[arg-type]
            self._object(value, kind, depth)

    def _container(self, snapshot: Callable[[], bool], values: Iterable[Any], depth: int) -> None:
        self.snapshots.append(snapshot)
        values = tuple(values)
        if len(values) <= LONGEST:
            self._push(values, depth + 1)

    def _dict(self, value: dict[Any, Any], depth: int) -> None:
        snapshot = DictSnapshot(value)
        self._container(snapshot, snapshot.saved.values(), depth)

    def _module(self, module: nn.Module, kind: type) -> None:
        snapshot = DictSnapshot(vars(module))
        self.snapshots += [snapshot, AttributeSnapshot(module, "__class__")]
        self._push(snapshot.saved.values(), 0)
        self._in_slots(module, kind, 0)
        if not issubclass(kind, _ScriptModule):
            self._object_class(kind)

    def _object(self, value: Any, kind: type, depth: int) -> None:
        attributes = getattr(kind, "__dictoffset__", 0) and object.__getattribute__(value, "__dict__")
        if isinstance(attributes, dict):
            self._dict(attributes, depth)
        self._in_slots(value, kind, depth)
        self._object_class(kind)

    def _in_slots(self, value: Any, kind: type, depth: int) -> None:
        for name in _slots(kind):
            slot = AttributeSnapshot(value, name)
            self._container(slot, (slot.saved,), depth)

    def _object_class(self, kind: type) -> None:
        """The data of a class and its bases, and the globals of its methods."""
        for cls in kind.__mro__ if self._beyond else ():
            if cls in self._classes or _of_library(cls):
                continue
            self._classes.add(cls)
            snapshot = ClassSnapshot(cls)
            self.snapshots.append(snapshot)
            for name, value in vars(cls).items():
                if name in snapshot.saved or type(value) is FunctionType:
                    self._push(_unwrapped(value), 1)

    def _function(self, function: FunctionType, depth: int) -> None:
        self._push((*(function.__closure__ or ()), *(function.__defaults__ or ())), depth + 1)
        if function.__kwdefaults__:
            self._push((function.__kwdefaults__,), depth)
        namespace = function.__globals__
        if depth > NEAREST or str(namespace.get("__name__")).partition(".")[0] in _LIBRARIES:
            return
        self._dict(vars(function), depth)
        known = self._globals.get(id(namespace))
        if known is None:
            known = self._globals[id(namespace)] = GlobalsSnapshot(namespace)
            self.snapshots.append(known)
        names = _global_names(function.__code__)
        known.names.update(names)
        self._push((known.saved[n] for n in names if n in known.saved), depth + 1)


@functools.cache
def _of_library(kind: Any) -> bool:
    return str(getattr(kind, "__module__", "")).partition(".")[0] in _LIBRARIES


@functools.lru_cache(maxsize=10_000)
def _global_names(code: CodeType) -> tuple[str, ...]:
    """Names that a function's code, and functions written in it, may look up among globals."""
    names = dict.fromkeys(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            names.update(dict.fromkeys(_global_names(constant)))
    return tuple(names)


def _unwrapped(value: Any) -> Iterator[Any]:
    """A method or an attribute of a class, without what makes it one."""
    if isinstance(value, staticmethod | classmethod):
        yield value.__func__
    elif isinstance(value, property):
        yield from (f for f in (value.fget, value.fset) if f is not None)
    elif isinstance(value, functools.cached_property | functools.partialmethod):
        yield value.func
    else:
        yield value


@functools.cache
def _slots(kind: type) -> tuple[str, ...]:
    """Names of the slots that a class and its bases declare, as they are stored."""
    names: list[str] = []
    for cls in kind.__mro__:
        declared = vars(cls).get("__slots__", ())
        for name in (declared,) if isinstance(declared, str) else tuple(declared):
            private = name.startswith("__") and not name.endswith("__")
            names.append(f"_{cls.__name__.lstrip('_')}{name}" if private else name)
    return tuple(n for n in names if n not in ("__dict__", "__weakref__"))
