"""Scikit-learn's digits: 1,797 images of 8x8 pixels, a few minutes on two cores."""

from __future__ import annotations

from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

from jaxtyping import Float, UInt8
from torch import Tensor
from torch.optim import SGD

from ..errors import TrainingError
from ..patterns import Channel
from ..training.schedules import cosine
from ..training.settings import RoundSettings
from .base import Loaders, Preset, start_of
from .datasets import TensorLoader, digits, normalise, random_shift
from .models import DigitsNet

__all__ = ["preset"]

TRAINED_EPOCHS = 40
"""Of the whole run from trained weights: 760 steps."""

_normalise = normalise((0.306,), (0.376,), scale=16)


def _augment(images: UInt8[Tensor, "n 1 8 8"]) -> Float[Tensor, "n 1 8 8"]:
    return _normalise(random_shift(images, 1))


def _load(path: Path | None) -> Loaders:
    if path is not None:
        raise TrainingError(f"the digits come with scikit-learn: preset 'digits' takes no data folder, got {path}")
    train, merge, test = digits()
    return Loaders(
        TensorLoader(train, 64, _augment, shuffle=True, drop_last=True),
        TensorLoader(merge, 512, _normalise),
        TensorLoader(test, 512, _normalise),
    )


def preset(
    *, weights: str | PathLike[str] | None = None, start: str | None = None, recipe: str | None = None
) -> Preset:
    """The digits.

    Args:
        weights: File of trained weights to start from: ``.safetensors``, or ``.pth`` or ``.pt`` with a state dict.
        start: ``"scratch"`` or ``"pretrained"``. Default: ``"pretrained"`` with ``weights``.
        recipe: Name of the recipe. Default: ``"pretrained"`` from trained weights, otherwise ``"cocktail"``.
    """
    return Preset(
        name="digits",
        model="resnet8",
        make_model=DigitsNet,
        load=_load,
        needs_data=False,
        input_shape=(1, 8, 8),
        threads=1,
        patterns=("unstructured", "n:m", Channel(round_to=1)),
        training=_training(start_of(weights, start), recipe),
        weights=None if weights is None else Path(weights),
    )


def _training(start: str, recipe: str | None) -> dict[str, Any]:
    """Keyword arguments of the trainer: 20 epochs a round, or 40 in all from trained weights."""
    if start == "pretrained" and recipe in (None, "pretrained"):
        return {"start": start, "epochs": TRAINED_EPOCHS}
    return {
        "start": start,
        "recipe": recipe,
        "optimizer": partial(SGD, lr=0.2 if start == "scratch" else 0.02, momentum=0.9, weight_decay=5e-4, fused=True),
        "schedule": cosine(warmup=0.05),
        "epochs": 20,
        "rounds": RoundSettings(rewind_epoch=3 if start == "scratch" else None),
    }
