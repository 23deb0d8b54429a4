"""Scikit-learn's digits: 1,797 images of 8x8 pixels, a few minutes on two cores."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from jaxtyping import Float, UInt8
from torch import Tensor
from torch.optim import SGD

from ..errors import TrainingError
from ..patterns import Channel
from ..training.schedules import cosine
from ..training.settings import RoundSettings
from .base import Loaders, Preset
from .datasets import TensorLoader, digits, normalise, random_shift
from .models import DigitsNet

__all__ = ["preset"]

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


def preset() -> Preset:
    """The preset."""
    return Preset(
        name="digits",
        model="resnet8",
        make_model=DigitsNet,
        load=_load,
        needs_data=False,
        input_shape=(1, 8, 8),
        threads=1,
        patterns=("unstructured", "n:m", Channel(round_to=1)),
        training={
            "recipe": "paper",
            "optimizer": partial(SGD, lr=0.2, momentum=0.9, weight_decay=5e-4, fused=True),
            "schedule": cosine(warmup=0.05),
            "epochs": 20,
            "rounds": RoundSettings(rewind_epoch=3),
        },
    )
