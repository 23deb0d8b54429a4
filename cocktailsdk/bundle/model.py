"""A model's tensors as bundles see them."""

from __future__ import annotations

import hashlib
import json

import torch
from torch import Tensor, nn

__all__ = ["all_tensors", "fingerprint", "stored_as", "stored_names"]


def all_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters, then buffers, each tensor once, by the first of its names."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def stored_names(model: nn.Module) -> list[str]:
    """Those of :func:`all_tensors` that a checkpoint holds."""
    fleeting = {
        f"{path}.{name}".lstrip(".") for path, m in model.named_modules() for name in m._non_persistent_buffers_set
    }
    return [n for n in all_tensors(model) if n not in fleeting]


def fingerprint(model: nn.Module) -> str:
    """A hash of the names, shapes and dtypes of a model's tensors."""
    rows = [[n, list(t.shape), str(t.dtype)] for n, t in sorted(all_tensors(model).items())]
    return hashlib.sha256(json.dumps(rows, separators=(",", ":")).encode()).hexdigest()


def stored_as(dtype: torch.dtype, stored: torch.dtype | None) -> torch.dtype:
    """What a parameter of some dtype is stored in."""
    smaller = stored is not None and dtype.is_floating_point and dtype.itemsize > stored.itemsize
    return stored if stored is not None and smaller else dtype
