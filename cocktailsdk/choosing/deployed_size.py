"""Bytes that a subnetwork takes once deployed, without making it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..net.subnet_model import SubnetModel

__all__ = ["deployed_bytes"]


def deployed_bytes(net: SubnetModel, name: str) -> int:
    """Bytes of the tensors of a subnetwork's plain slim model, zeros included: what ``.safetensors`` holds of it.

    Raises:
        SubnetError: There is no such subnetwork.
    """
    mask = net.masks.get(net.subnet(name).name)
    keep: dict[str, Tensor] = {}
    gone: tuple[str, ...] = ()
    if mask is not None:
        gone = tuple(f"{path}." for b in mask.dropped(net.coupling) for path in b.modules)
        if mask.removed is not None:
            keep = net.coupling.left(mask.removed)
        keep |= net.coupling.left_by_experts(mask.experts)
    total, seen = 0, set()
    for tensor_name, t in net.model.state_dict(keep_vars=True).items():
        if not isinstance(t, Tensor) or id(t) in seen or tensor_name.startswith(gone or ("\0",)):
            continue
        seen.add(id(t))
        remaining = _remaining(keep[tensor_name], t.shape) if tensor_name in keep else t.numel()
        total += remaining * t.element_size()
    return total


def _remaining(keep: Tensor, shape: torch.Size) -> int:
    """Elements of what is left of a tensor; all of it where no slice can hold what stays."""
    keep = keep.reshape((1,) * (len(shape) - keep.ndim) + tuple(keep.shape))
    along = []
    for d in range(keep.ndim):
        others = [k for k in range(keep.ndim) if k != d]
        along.append(int((keep.amax(others) if others else keep).sum()))
    if math.prod(along) != int(keep.sum()):
        return shape.numel()
    return math.prod(n if keep.shape[d] > 1 else shape[d] * n for d, n in enumerate(along))
