"""Public names that moved: the old ones work for one more version, with a warning that says what to write."""

from __future__ import annotations

import functools
import importlib
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar, cast

if TYPE_CHECKING:
    from importlib.abc import Loader

__all__ = ["install", "moved_names", "renamed_fields"]

T = TypeVar("T")

MODULES = {
    "cocktailsdk.adapters": "cocktailsdk.models",
    "cocktailsdk.checks": "cocktailsdk.verify",
    "cocktailsdk.counts": "cocktailsdk.net.costs",
    "cocktailsdk.datasets": "cocktailsdk.presets.datasets",
    "cocktailsdk.devices": "cocktailsdk.utils.devices",
    "cocktailsdk.hub": "cocktailsdk.bundle.hub_mixin",
    "cocktailsdk.training.ranks": "cocktailsdk.training.distributed.ranks",
    "cocktailsdk.graph.recoded": "cocktailsdk.graph.rewritten_module",  # in pickles of slim models
}
"""Modules whose names were documented or typed in examples, by their old names."""


def moved_names(module: str, names: Mapping[str, str], late: Mapping[str, str] | None = None) -> Callable[[str], Any]:
    """A ``__getattr__`` for a module some of whose names are elsewhere now.

    Args:
        module: The module's name.
        names: By old name the new one, dotted: ``"cocktailsdk.sparsify"``.
        late: By name, the module below this one that has it, imported when the name is first used: ``".read"``.
    """

    def look_up(name: str) -> Any:
        if late is not None and name in late:
            return getattr(importlib.import_module(late[name], module), name)
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        _warn(f"{module}.{name}", names[name])
        parent, _, last = names[name].rpartition(".")
        return getattr(importlib.import_module(parent), last)

    return look_up


def renamed_fields(gone: Mapping[str, str] | None = None, **names: str) -> Callable[[type[T]], type[T]]:
    """A decorator of dataclasses: old names of fields still work, as keywords and as attributes.

    Args:
        gone: By the name of a field that is no more what to do instead.
        **names: By old name the new one.
    """

    def decorate(cls: type[T]) -> type[T]:
        init = cls.__init__

        @functools.wraps(init)
        def with_old_names(self: T, *args: Any, **keywords: Any) -> None:
            for old in (gone or {}).keys() & keywords.keys():
                raise TypeError(f"{cls.__name__} has no field {old!r} any more: {(gone or {})[old]}")
            for old in names.keys() & keywords.keys():
                _warn(f"{cls.__name__}({old}=...)", f"{cls.__name__}({names[old]}=...)")
                keywords[names[old]] = keywords.pop(old)
            init(self, *args, **keywords)

        setattr(cls, "__init__", with_old_names)  # noqa: B010, what mypy takes
        for old in names:
            setattr(cls, old, property(functools.partial(_renamed, old=old, new=names[old])))
        return cls

    return decorate


def _renamed(instance: Any, old: str, new: str) -> Any:
    kind = type(instance).__name__
    _warn(f"{kind}.{old}", f"{kind}.{new}")
    return getattr(instance, new)


def install() -> None:
    """Let the old modules be imported. Importing the package calls this."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())


class _Finder:
    """Finds and loads the old modules. It stands last in the list, so it is not asked where a module is found.

    It has the methods of ``importlib.abc.MetaPathFinder`` and ``Loader`` without these as base classes: importing
    ``importlib.abc`` takes longer than the rest of ``import cocktailsdk`` (16 of 38 ms with Python 3.11).
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        del path, target
        return ModuleSpec(fullname, cast("Loader", self)) if fullname in MODULES else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        _warn(spec.name, MODULES[spec.name])
        module = importlib.import_module(MODULES[spec.name])
        # Between create_module and exec_module, importlib replaces the module's spec by this one. exec_module puts it
        # back, so that the module still has its new name, for `importlib.reload` for example.
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        spec = module.__spec__
        if spec is not None:
            module.__spec__ = spec.loader_state


def _warn(old: str, new: str) -> None:
    warnings.warn(f"{old} is {new} now; the old name goes with the next version", DeprecationWarning, stacklevel=3)
