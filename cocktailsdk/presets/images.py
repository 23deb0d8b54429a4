"""The presets of image sets, CIFAR-10 and Fashion-MNIST.

From scratch they have the paper's settings for small images (section 4.1), from trained weights those of the recipe
``"pretrained"``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.optim import SGD

from ..errors import TrainingError
from ..patterns import Channel
from ..training.schedules import cosine, cosine_restarts
from ..training.settings import RoundSettings
from .base import Loaders, Preset, start_of
from .datasets import Images, TensorLoader, cifar10, fashion_mnist, normalise, standard_augmentation
from .models import CifarResNet, ResNet18

__all__ = ["cifar10_preset", "fashion_mnist_preset"]

EPOCHS = 150
"""Of each round, as in the paper."""
TRAINED_EPOCHS = 5
"""Of the whole run from trained weights: 1,860 steps on CIFAR-10."""
REWIND_EPOCH = 7
BATCH_SIZE = 128
HELD_OUT = 0.05

_SGD = partial(SGD, momentum=0.9, weight_decay=1e-4)

MODELS: dict[str, Callable[[int], nn.Module]] = {
    "resnet20": lambda channels: CifarResNet(20, channels=channels),
    "resnet18": lambda channels: ResNet18(channels=channels),
}


def cifar10_preset(
    *,
    model: str = "resnet20",
    epochs_scale: float = 1.0,
    weights: str | PathLike[str] | None = None,
    start: str | None = None,
    recipe: str | None = None,
) -> Preset:
    """CIFAR-10.

    Args:
        model: ``"resnet20"`` (0.27 M parameters) or ``"resnet18"`` (11.2 M, the paper's).
        epochs_scale: Multiplies the epochs: 150 in each of 11 rounds, or 5 in all from trained weights.
        weights: File of trained weights to start from: ``.safetensors``, or ``.pth`` or ``.pt`` with a state dict.
        start: ``"scratch"`` or ``"pretrained"``. Default: ``"pretrained"`` with ``weights``.
        recipe: Name of the recipe. Default: ``"pretrained"`` from trained weights, otherwise ``"paper"``.
    """
    load = partial(_load, cifar10, normalise((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    training = _training(epochs_scale, start_of(weights, start), recipe)
    return _image_preset("cifar10", (3, 32, 32), load, model, training, weights)


def fashion_mnist_preset(
    *,
    model: str = "resnet20",
    epochs_scale: float = 1.0,
    weights: str | PathLike[str] | None = None,
    start: str | None = None,
    recipe: str | None = None,
) -> Preset:
    """Fashion-MNIST, with the settings of CIFAR-10.

    Args:
        model: ``"resnet20"`` (0.27 M parameters) or ``"resnet18"`` (11.2 M).
        epochs_scale: Multiplies the epochs: 150 in each of 11 rounds, or 5 in all from trained weights.
        weights: File of trained weights to start from: ``.safetensors``, or ``.pth`` or ``.pt`` with a state dict.
        start: ``"scratch"`` or ``"pretrained"``. Default: ``"pretrained"`` with ``weights``.
        recipe: Name of the recipe. Default: ``"pretrained"`` from trained weights, otherwise ``"paper"``.
    """
    load = partial(_load, fashion_mnist, normalise((0.2860,), (0.3530,)))
    training = _training(epochs_scale, start_of(weights, start), recipe)
    return _image_preset("fashion-mnist", (1, 28, 28), load, model, training, weights)


def _training(epochs_scale: float, start: str, recipe: str | None) -> dict[str, Any]:
    """Keyword arguments of the trainer.

    From scratch, the paper's: SGD at rate 0.1 with momentum 0.9 and weight decay 1e-4, 150 epochs a round, rewinding to
    epoch 7; cosine over 100 epochs, then warm restarts every 10.

    From trained weights, 5 epochs in all with the trainer's own optimizer and schedule. A recipe of several rounds
    instead trains 150 epochs a round, and the rate falls from 0.01 along one cosine.

    Raises:
        TrainingError: For a scale that is not positive.
    """
    if not epochs_scale > 0:
        raise TrainingError(f"epochs_scale must be greater than 0, got {epochs_scale}")
    if start == "pretrained" and recipe in (None, "pretrained"):
        return {"start": start, "epochs": TRAINED_EPOCHS * epochs_scale}
    epochs = max(1, round(EPOCHS * epochs_scale))
    training: dict[str, Any] = {"recipe": recipe or "paper", "epochs": epochs}
    if start == "pretrained":
        return training | {
            "start": start,
            "optimizer": partial(_SGD, lr=0.01),
            "schedule": cosine(minimum=0.01),
        }
    return training | {
        "optimizer": partial(_SGD, lr=0.1),
        "schedule": cosine_restarts(),
        "rounds": RoundSettings(rewind_epoch=min(max(1, round(REWIND_EPOCH * epochs_scale)), epochs)),
    }


def _image_preset(
    name: str,
    input_shape: tuple[int, int, int],
    load: Callable[[Path | None], Loaders],
    model: str,
    training: Mapping[str, Any],
    weights: str | PathLike[str] | None,
) -> Preset:
    """A preset of images; batches of 128, and the last 5 % of the training set are held out.

    Args:
        name: Of the preset.
        input_shape: Of an image.
        load: Loads the data from a folder.
        model: ``"resnet20"`` or ``"resnet18"``.
        training: Keyword arguments of the trainer.
        weights: File of trained weights to start from.

    Raises:
        TrainingError: For an unknown model.
    """
    if model not in MODELS:
        raise TrainingError(f"preset {name!r} has no model {model!r}: it has {', '.join(MODELS)}")
    return Preset(
        name=name,
        model=model,
        make_model=partial(MODELS[model], input_shape[0]),
        load=load,
        needs_data=True,
        input_shape=input_shape,
        patterns=("unstructured", "n:m", Channel(round_to=1)),
        training=training,
        weights=None if weights is None else Path(weights),
        models=tuple(MODELS),
    )


def _load(
    read: Callable[[Path], tuple[Images, Images]], transform: Callable[[Tensor], Tensor], path: Path | None
) -> Loaders:
    assert path is not None  # the preset needs data
    train, test = read(path)
    held_out = round(HELD_OUT * len(train))

    def plain(images: UInt8[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        # convolutions are up to twice as fast on this layout, on processors as well as on GPUs
        return transform(images).contiguous(memory_format=torch.channels_last)

    def augment(images: UInt8[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        return plain(standard_augmentation(images))

    return Loaders(
        TensorLoader(train[: len(train) - held_out], BATCH_SIZE, augment, shuffle=True),
        TensorLoader(train[len(train) - held_out :], BATCH_SIZE, plain),
        TensorLoader(test, BATCH_SIZE, plain),
    )
