"""Fashion-MNIST with the paper's settings for CIFAR-10."""

from __future__ import annotations

from os import PathLike

from .base import Preset
from .datasets import fashion_mnist
from .images import image_preset

__all__ = ["preset"]


def preset(*, model: str = "resnet20", epochs_scale: float = 1.0, weights: str | PathLike[str] | None = None) -> Preset:
    """The preset.

    Args:
        model: ``"resnet20"`` (0.27 M parameters) or ``"resnet18"`` (11.2 M).
        epochs_scale: 1 for 150 epochs in each of 11 rounds; 0.02 makes it 3.
        weights: Trained weights to start from, instead of round 0.
    """
    return image_preset(
        "fashion-mnist",
        fashion_mnist,
        (1, 28, 28),
        (0.2860,),
        (0.3530,),
        model=model,
        epochs_scale=epochs_scale,
        weights=weights,
    )
