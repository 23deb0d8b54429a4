"""CIFAR-10 with the paper's settings."""

from __future__ import annotations

from os import PathLike

from .base import Preset
from .datasets import cifar10
from .images import image_preset

__all__ = ["preset"]


def preset(*, model: str = "resnet20", epochs_scale: float = 1.0, weights: str | PathLike[str] | None = None) -> Preset:
    """The preset.

    Args:
        model: ``"resnet20"`` (0.27 M parameters) or ``"resnet18"`` (11.2 M, the paper's).
        epochs_scale: 1 for the paper's 150 epochs in each of 11 rounds; 0.02 makes it 3.
        weights: Trained weights to start from, instead of round 0.
    """
    return image_preset(
        "cifar10",
        cifar10,
        (3, 32, 32),
        (0.485, 0.456, 0.406),
        (0.229, 0.224, 0.225),
        model=model,
        epochs_scale=epochs_scale,
        weights=weights,
    )
