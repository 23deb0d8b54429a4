"""What the methods are compared on: small enough for two cores, and still real.

``cifar``: CIFAR-10 halved to 16x16 pixels by averaging, 20,000 training images (2,000 a class) and the whole test set;
a ResNet-8 (75 k parameters). ``vit``: the same images and a transformer of four blocks, 64 wide, on 2x2 patches.
``digits``: scikit-learn's digits, which come with a package, for trying the harness out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, AdamW, Optimizer

from cocktailsdk.presets import Loaders
from cocktailsdk.presets.datasets import Images, TensorLoader, cifar10, digits, normalise, random_shift
from cocktailsdk.presets.models import CifarResNet, DigitsNet
from cocktailsdk.training.schedules import ScheduleFactory, cosine, cosine_restarts

BATCH, TRAIN, HELD_OUT, RECALIBRATION = 128, 20_000, 1_000, 4
"""Images of a batch, for training, for merging (the last 5 % of those), and batches for statistics."""


@dataclass(frozen=True)
class Task:
    """A model, data, and how they are trained, the same for every method.

    Attributes:
        name: What it is called.
        title: In words.
        model: Builds the model.
        loaders: ``loaders(folder)``.
        example: Shape of one image.
        optimizer: Of every round.
        schedule: Of every round.
        steps: Optimizer steps of a method's whole run.
    """

    name: str
    title: str
    model: Callable[[], nn.Module]
    loaders: Callable[[Path | None], Loaders]
    example: tuple[int, int, int]
    optimizer: Callable[[Iterable[Any]], Optimizer]
    schedule: ScheduleFactory
    steps: int


def _halved(data: Images) -> Images:
    small = F.avg_pool2d(data.images.float(), 2).round().to(torch.uint8)
    return Images(small, data.labels)


def _cifar(folder: Path | None) -> Loaders:
    if folder is None:
        raise SystemExit("these tasks need CIFAR-10: --data FOLDER, or COCKTAIL_DATA with a folder cifar10/ in it")
    train, test = cifar10(folder)
    train, test = _halved(train[:TRAIN]), _halved(test)  # classes alternate, so the first images are balanced
    plain = normalise((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

    def ready(images: Tensor) -> Tensor:
        return plain(images).contiguous(memory_format=torch.channels_last)

    def augmented(images: Tensor) -> Tensor:
        images = random_shift(images, 2)
        mirrored = torch.rand(len(images), 1, 1, 1) < 0.5
        return ready(torch.where(mirrored, images.flip(3), images))

    return Loaders(
        TensorLoader(train[: TRAIN - HELD_OUT], BATCH, augmented, shuffle=True, drop_last=True),
        TensorLoader(train[TRAIN - HELD_OUT :], 500, ready),
        TensorLoader(test, 1000, ready),
    )


def _digits(folder: Path | None) -> Loaders:
    del folder
    train, merge, test = digits()
    plain = normalise((0.306,), (0.376,), scale=16)
    shifted = TensorLoader(train, 64, lambda x: plain(random_shift(x, 1)), shuffle=True, drop_last=True)
    return Loaders(shifted, TensorLoader(merge, 512, plain), TensorLoader(test, 512, plain))


def _resnet8() -> nn.Module:
    return CifarResNet(8).to(memory_format=torch.channels_last)


def _vit() -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    made: nn.Module = VisionTransformer(
        img_size=16, patch_size=2, num_classes=10, embed_dim=64, depth=4, num_heads=4, mlp_ratio=2, global_pool="avg"
    )
    return made


def _sgd(parameters: Iterable[Any]) -> Optimizer:
    return SGD(parameters, lr=0.1, momentum=0.9, weight_decay=1e-4)


def _digits_sgd(parameters: Iterable[Any]) -> Optimizer:
    return SGD(parameters, lr=0.2, momentum=0.9, weight_decay=5e-4)


def _adamw(parameters: Iterable[Any]) -> Optimizer:
    return AdamW(parameters, lr=2e-3, weight_decay=0.05)


TASKS = {
    task.name: task
    for task in (
        Task(
            "cifar", "ResNet-8 on CIFAR-10 (JPEG version) at 16x16", _resnet8, _cifar, (3, 16, 16), _sgd,
            cosine_restarts(), 8_200,
        ),
        Task(
            "vit", "Small ViT on CIFAR-10 (JPEG version) at 16x16", _vit, _cifar, (3, 16, 16), _adamw,
            cosine(warmup=0.05, minimum=0.01), 8_200,
        ),
        Task(
            "digits", "ResNet-8 on scikit-learn's digits", partial(DigitsNet), _digits, (1, 8, 8), _digits_sgd,
            cosine(warmup=0.05), 2_300,
        ),
    )
}  # fmt: skip
