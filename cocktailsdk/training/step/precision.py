"""Mixed precision: passes in 16 bits, weights and everything that decides in their own precision."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ...errors import TrainingError
from ...net.switcher import forget_derived
from .forward import mapped

__all__ = ["FULL", "MixedPrecision", "Precision", "without_autocast"]

MixedPrecision = Literal["bf16", "fp16"]
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Precision:
    """In what training passes compute.

    Attributes:
        name: ``"bf16"``, ``"fp16"``, or ``None`` for the weights' own.
    """

    name: MixedPrecision | None = None

    def __post_init__(self) -> None:
        if self.name not in (None, *_DTYPES):
            raise TrainingError(f'mixed_precision must be None, "bf16" or "fp16", got {self.name!r}')

    def passes(self, run: Callable[[], tuple[Any, Any]], device: torch.device) -> tuple[Any, Any]:
        """A forward pass under autocast, its output in single precision, so that losses are."""
        if self.name is None:
            return run()
        forget_derived()  # inside an autocast of the caller's, leaving this one would not drop casts of older weights
        with torch.autocast(device.type, _DTYPES[self.name]):
            output, target = run()
        return mapped(output, _single), target

    def scaler(self, device: torch.device) -> torch.amp.GradScaler | None:
        """What scales losses such that small gradients do not vanish in 16 bits; only fp16 needs it."""
        return torch.amp.GradScaler(device.type) if self.name == "fp16" else None


FULL = Precision()


def _single(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


@contextmanager
def without_autocast(device: torch.device) -> Iterator[None]:
    """Leave the caller's autocast, under which masks, statistics and merging would be computed in 16 bits."""
    inside = torch.is_autocast_enabled(device.type)
    with torch.autocast(device.type, enabled=False) if inside else nullcontext():
        try:
            yield
        finally:
            forget_derived()  # the caller's context may have kept casts of weights that have changed
