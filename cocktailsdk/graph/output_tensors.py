"""The tensors in what a model returns, whatever holds them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

__all__ = ["tensors_of"]


def tensors_of(output: Any) -> list[Tensor]:
    """Tensors of tuples, lists, mappings, dataclasses (registered with ``torch.export`` or not) and whatever has a
    ``to_tuple()``, in order; what else there is (a language model's cache) is left out."""
    return list(_walk(output))


def _walk(value: Any) -> Iterator[Tensor]:
    if not isinstance(value, Tensor | list | tuple | dict) and hasattr(value, "to_tuple"):
        value = value.to_tuple()
    for leaf in tree_leaves(value):
        if isinstance(leaf, Tensor):
            yield leaf
        elif dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            for field in dataclasses.fields(leaf):
                yield from _walk(getattr(leaf, field.name))
