"""In-place writes into known tensors, undone: a tensor is copied when, and only when, it is about to be written."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["Writes", "is_plain"]

UNDECLARED = frozenset({"running_mean", "running_var"})
"""Arguments that old batch-norm kernels write though their schemas do not say so."""

_PLAIN = frozenset({Tensor, nn.Parameter, nn.Buffer})


def is_plain(value: Tensor) -> bool:
    """Whether a tensor has memory of its own: no subclass, and no stand-in (fake, functional, distributed)."""
    return type(value) in _PLAIN and value.layout == torch.strided


class Writes(TorchDispatchMode):
    """Inside, each of some tensors is copied before the first operation that writes it.

    Buffers can be large (a cache for 128 k positions), and almost none are written, so copying all of them beforehand
    would double a model's memory. A dispatch mode sees every operation, also those of hooks and of compiled modules'
    Python code; only writes past PyTorch (through ``tensor.numpy()``) escape it.

    Args:
        tensors: The tensors. They must stay alive, with the memory they have now.
    """

    supports_higher_order_operators = True

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        super().__init__()
        self._known = {place for t in tensors if (place := _place(t)) is not None}
        self._saved: dict[tuple[torch.device, int], tuple[Tensor, Tensor]] = {}

    @classmethod
    def is_infra_mode(cls) -> bool:
        """It only looks on, so ``torch.export`` and higher-order operators need not care."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._known:
            for value in _written(func, args, kwargs):
                self._save(value)
        return func(*args, **kwargs)

    def _save(self, value: Tensor) -> None:
        place = _place(value)
        if place in self._known and place not in self._saved:
            storage = value.untyped_storage()
            memory = torch.empty(0, dtype=torch.uint8, device=value.device).set_(storage)
            self._saved[place] = (memory, memory.clone())

    def undo(self) -> None:
        """Put the values back that were there before the first write, and forget them."""
        saved, self._saved = self._saved, {}
        with torch.no_grad():
            for memory, value in saved.values():
                memory.copy_(value)


def _place(value: Tensor) -> tuple[torch.device, int] | None:
    if not is_plain(value) or value.is_meta:
        return None
    try:
        address = value.untyped_storage().data_ptr()
    except RuntimeError:  # a wrapper of functionalization, which has no memory
        return None
    return (value.device, address) if address else None


@cache
def _writers(func: Any) -> tuple[tuple[int, str], ...]:
    """Position and name of each argument that an operation writes."""
    schema = getattr(func, "_schema", None)
    if schema is None:  # a higher-order operator; what runs inside comes here by itself
        return ()
    return tuple(
        (i, a.name)
        for i, a in enumerate(schema.arguments)
        if (a.alias_info is not None and a.alias_info.is_write) or a.name in UNDECLARED
    )


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Tensor]:
    for i, name in _writers(func):
        value = args[i] if i < len(args) else kwargs.get(name)
        for leaf in (value,) if isinstance(value, Tensor) else tree_leaves(value):
            if isinstance(leaf, Tensor):
                yield leaf
