"""torchvision: classification, detection, segmentation and video models by name."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from cocktailsdk.adapters import suggestions
from cocktailsdk.errors import AdapterError

from .images import example_images

if TYPE_CHECKING:
    from torch import nn

__all__ = ["TorchvisionAdapter"]

PREFIX = "torchvision:"


class TorchvisionAdapter:
    """``torchvision:resnet18``."""

    name = "torchvision"

    def owns(self, reference: str) -> bool:
        """Everything that begins with ``torchvision:``."""
        return reference.startswith(PREFIX)

    def build(self, reference: str, *, pretrained: bool = False) -> nn.Module:
        """The model with random weights, or with the default trained ones."""
        from torchvision import models

        name = reference.removeprefix(PREFIX)
        if name not in models.list_models():
            raise AdapterError(f"torchvision has no model {name!r}{suggestions(PREFIX + name, self.references())}")
        # A backbone of its own would be fetched even where the model's weights are random.
        options = {} if pretrained or "weights_backbone" not in _arguments(name) else {"weights_backbone": None}
        try:
            model: nn.Module = models.get_model(name, weights="DEFAULT" if pretrained else None, **options)
        except Exception as error:
            if not pretrained:
                raise AdapterError(f"torchvision could not build {name!r}: {type(error).__name__}: {error}") from error
            raise AdapterError(
                f"the trained weights of {reference!r} could not be had ({type(error).__name__}: {error}). "
                "Is there a network? Without pretrained weights they are random."
            ) from error
        return model

    def example_inputs(self, model: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """One image (detection: a list of one), or 16 frames for video models."""
        home = type(model).__module__
        if not home.startswith("torchvision.models."):
            return None
        if ".detection." in home:
            return ([example_images((3, 320, 320))],), {}
        if ".video." in home:
            return (example_images((1, 3, 16, 112, 112)),), {}
        if ".optical_flow." in home:
            return (example_images((1, 3, 128, 128)), example_images((1, 3, 128, 128))), {}
        size = 299 if type(model).__name__ == "Inception3" else getattr(model, "image_size", 224)
        return (example_images((1, 3, size, size)),), {}

    def references(self) -> Iterable[str]:
        """All of torchvision's models, quantised ones left out."""
        from torchvision import models

        return [PREFIX + n for n in models.list_models() if not n.startswith("quantized_")]


def _arguments(name: str) -> Iterable[str]:
    import inspect

    from torchvision import models

    return inspect.signature(models.get_model_builder(name)).parameters
