"""Torchvision's detectors resize images by themselves; here they come in the size that they are to have."""

from __future__ import annotations

from torch import Tensor
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from ..config import Config


class Unresized(GeneralizedRCNNTransform):
    """Normalises images and puts them into one tensor, in their own size.

    Torchvision's ``_skip_resize`` does so in training alone.
    """

    def resize(self, image: Tensor, target: dict[str, Tensor] | None = None) -> tuple[Tensor, dict[str, Tensor] | None]:
        """An image and its target as they are."""
        return image, target


def unresized(cfg: Config) -> Unresized:
    """The transform that a configuration asks for; sizes have no meaning in it."""
    return Unresized(0, 0, cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD)
