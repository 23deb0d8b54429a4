"""Forms in which a run's parts are kept: masks as named tensors, states without memory shared and of plain values."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...masks import Mask
from ...net.subnet_model import SubnetModel

__all__ = ["pack_masks", "plain", "to_cpu", "unpack_masks"]


def pack_masks(masks: Mapping[str, Mask]) -> dict[str, Tensor]:
    """Masks as one mapping of tensors; one that masks nothing leaves an empty one."""
    out = {}
    for name, mask in masks.items():
        out.update({f"{name}/elements/{key}": value for key, value in mask.elements.items()})
        if mask.removed is not None:
            out[f"{name}/removed"] = mask.removed
        elif not mask.elements:
            out[f"{name}/nothing"] = torch.zeros(0, dtype=torch.bool)
    return out


def unpack_masks(tensors: Mapping[str, Tensor], net: SubnetModel) -> dict[str, Mask]:
    """The inverse of :func:`pack_masks`; weights are in the network's order, whatever the file's."""
    place = {weight.name: i for i, weight in enumerate(net.eligible)}
    elements: dict[str, dict[str, Tensor]] = {}
    removed: dict[str, Tensor] = {}
    for key in sorted(tensors, key=lambda k: place.get(k.split("/", 2)[-1], len(place))):
        name, kind, *rest = key.split("/", 2)
        if kind == "removed":
            removed[name] = tensors[key]
        elif kind == "elements":
            elements.setdefault(name, {})[rest[0]] = tensors[key]
        else:
            elements.setdefault(name, {})
    return {name: Mask(elements.get(name, {}), removed.get(name)) for name in sorted({*elements, *removed})}


def to_cpu(value: Any) -> Any:
    """A copy of nested containers with copies of their tensors on the CPU."""
    return _mapped(value, lambda v: v.detach().to("cpu", copy=True) if isinstance(v, Tensor) else v)


def plain(value: Any) -> Any:
    """Nested containers with NumPy's numbers as Python's, which need no code to be read; tensors are not copied."""
    return _mapped(value, lambda v: v.item() if isinstance(v, np.generic) else v)


def _mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(value, Mapping):
        new = {k: _mapped(v, change) for k, v in value.items()}
        return type(value)(new) if isinstance(value, Counter | OrderedDict) else new
    if type(value) in (list, tuple):
        return type(value)(_mapped(v, change) for v in value)
    return change(value)
