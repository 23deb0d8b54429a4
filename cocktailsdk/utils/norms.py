"""Norms that keep running statistics."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["Norm", "norm_buffers", "running_norms"]

Norm = _BatchNorm | nn.InstanceNorm1d | nn.InstanceNorm2d | nn.InstanceNorm3d
"""Batch norms of any kind (synchronised ones too), and instance norms."""


def running_norms(model: nn.Module) -> dict[str, Norm]:
    """The norms that keep running statistics, by path."""
    return {path: m for path, m in model.named_modules() if isinstance(m, Norm) and m.running_mean is not None}


def norm_buffers(model: nn.Module) -> tuple[str, ...]:
    """Names of all their buffers, ``num_batches_tracked`` included."""
    return tuple(f"{path}.{name}".lstrip(".") for path, m in running_norms(model).items() for name in m._buffers)
