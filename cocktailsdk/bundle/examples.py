"""Example inputs described by structure, shape and range, so that they can be made again without storing data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import BundleError

_MAX_ELEMENTS = 1 << 32


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


def remake(spec: Any) -> Any:
    """A value of the described kind; tensors get values drawn evenly from their range, always the same ones.

    Raises:
        BundleError: The description makes no sense.
    """
    return _remake(spec, torch.Generator().manual_seed(0))


def _remake(spec: Any, generator: torch.Generator) -> Any:
    if "value" in spec:
        return spec["value"]
    if "list" in spec:
        return [_remake(s, generator) for s in spec["list"]]
    if "tuple" in spec:
        return tuple(_remake(s, generator) for s in spec["tuple"])
    if "dict" in spec:
        return {k: _remake(s, generator) for k, s in spec["dict"]}
    dtype, shape = getattr(torch, spec["tensor"], None), tuple(spec["shape"])
    if not isinstance(dtype, torch.dtype) or any(not isinstance(n, int) or n < 0 for n in shape):
        raise BundleError(f"an example input is described as {spec['tensor']!r} of shape {shape}")
    if math.prod(shape) > _MAX_ELEMENTS:
        raise BundleError(f"an example input has shape {shape}: too large to make")
    low, high = spec.get("range", (0, 1))
    if dtype.is_floating_point:
        draw = torch.rand(shape, generator=generator, dtype=torch.float64)
        return (low + (high - low) * draw).clamp(low, high).to(dtype)
    if high - low >= 2**63 - 1:
        low, high = 0, 1
    return torch.randint(low, high + 1, shape, generator=generator, dtype=torch.int64).to(dtype)
