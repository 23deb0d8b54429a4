"""Example inputs described by structure, shape and range, so that they can be made again without storing data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import BundleError
from ..io.limits import MAX_DIMS, MAX_EXAMPLE_ELEMENTS, MAX_EXAMPLE_VALUES
from ..io.values import integer, items, keyed, quoted, text


def describe(value: Any) -> Any:
    """A value as JSON.

    Tensors become dtype, shape and the range of their values; tuples, lists, dicts with string keys, numbers, strings,
    booleans and ``None`` are kept.

    Raises:
        BundleError: The value holds anything else.
    """
    if isinstance(value, Tensor):
        if value.is_complex() or value.is_quantized or value.layout != torch.strided:
            raise BundleError(f"an example input of {value.dtype}, {value.layout} cannot be described")
        out = {"tensor": str(value.dtype).removeprefix("torch."), "shape": list(value.shape)}
        if value.numel():
            wide = value.detach().to("cpu", torch.float64 if value.is_floating_point() else torch.int64)
            low, high = wide.min().item(), wide.max().item()
            if math.isfinite(low) and math.isfinite(high):
                out["range"] = [low, high]
        return out
    if value is None or isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value)):
        return {"value": value}
    if type(value) in (list, tuple):
        return {type(value).__name__: [describe(v) for v in value]}
    if isinstance(value, Mapping) and all(isinstance(k, str) for k in value):
        return {"dict": [[k, describe(v)] for k, v in value.items()]}
    raise BundleError(f"an example input of type {type(value).__name__} cannot be described")


def elements(spec: Any) -> int:
    """How many elements the tensors of a description have in all."""
    if "tensor" in spec:
        return math.prod(spec["shape"])
    inner = spec.get("list") or spec.get("tuple") or [v for _, v in spec.get("dict", ())]
    return sum(map(elements, inner))


def values(spec: Any) -> int:
    """How many values and containers a description has."""
    inner = spec.get("list") or spec.get("tuple") or [v for _, v in spec.get("dict", ())]
    return 1 + sum(map(values, inner))


def remake(spec: Any) -> Any:
    """A value of the described kind; tensors get values drawn evenly from their range, always the same ones.

    Raises:
        BundleError: The description makes no sense, or asks for too much.
    """
    return _Maker().value(spec)


class _Maker:
    """Values from descriptions, as many elements as there may be in all."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)
        self.left = MAX_EXAMPLE_ELEMENTS
        self.values = MAX_EXAMPLE_VALUES

    def value(self, spec: Any) -> Any:
        self.values -= 1
        if self.values < 0:
            raise BundleError(f"the bundle's example inputs have more than {MAX_EXAMPLE_VALUES} values")
        if type(spec) is dict and "tensor" in spec:
            return self.tensor(keyed(spec, _WHAT, ("tensor", "shape"), ("range",)))
        kind, inner = next(iter(keyed(spec, _WHAT, (), ("value", "list", "tuple", "dict")).items()), ("", None))
        if len(spec) != 1:
            raise BundleError(f"the bundle has {_WHAT} described by {quoted(spec)}")
        if kind == "value":
            if inner is not None and type(inner) not in (bool, int, float, str):
                raise BundleError(f"the bundle has {_WHAT} of the value {quoted(inner)}")
            return inner
        parts = items(inner, _WHAT)
        if kind == "dict":
            pairs = [items(p, _WHAT, 2) for p in parts]
            return {text(k, "the name of an example input"): self.value(v) for k, v in pairs}
        made = [self.value(p) for p in parts]
        return tuple(made) if kind == "tuple" else made

    def tensor(self, spec: Mapping[str, Any]) -> Tensor:
        dtype = getattr(torch, text(spec["tensor"], "an example's dtype"), None)
        shape = tuple(integer(n, "an example's shape") for n in items(spec["shape"], "an example's shape"))
        if not isinstance(dtype, torch.dtype) or dtype.is_complex:
            raise BundleError(f"the bundle has {_WHAT} of {quoted(spec['tensor'])}")
        if len(shape) > MAX_DIMS:
            raise BundleError(f"the bundle has {_WHAT} of {len(shape)} dimensions; at most {MAX_DIMS} are read")
        self.left -= math.prod(n or 1 for n in shape)  # torch counts in the same way where a dimension is 0
        if self.left < 0:
            raise BundleError(f"the bundle's example inputs are too large to make: one has shape {quoted(list(shape))}")
        low, high = items(spec.get("range", [0, 1]), "an example's range", 2)
        kinds = (int, float) if dtype.is_floating_point else (int,)
        if type(low) not in kinds or type(high) not in kinds or not -_FAR <= low <= high <= _FAR:
            raise BundleError(f"the bundle has {_WHAT} between {quoted(low)} and {quoted(high)}")
        if dtype.is_floating_point:
            draw = torch.rand(shape, generator=self.generator, dtype=torch.float64)
            return draw.mul_(high - low).add_(low).clamp_(low, high).to(dtype)
        if high - low >= 2**63 - 1 or high >= 2**63 - 1 or low < -(2**63):
            low, high = 0, 1
        return torch.randint(low, high + 1, shape, generator=self.generator, dtype=torch.int64).to(dtype)


_WHAT = "an example input"
_FAR = 1.8e308
