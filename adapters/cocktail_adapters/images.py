"""Example images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def example_images(shape: Sequence[int]) -> Tensor:
    """One batch of noise, always the same. Noise, not zeros: zeros would hide what a model does with its input."""
    import torch

    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))
