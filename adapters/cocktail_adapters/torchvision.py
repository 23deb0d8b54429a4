"""torchvision: classification, detection, segmentation and video models by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from cocktailsdk.errors import AdapterError
from cocktailsdk.models import suggestions
from cocktailsdk.records import fenced
from cocktailsdk.utils.optional import installed, require

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
        models = _models()
        name = reference.removeprefix(PREFIX)
        if name not in models.list_models():
            raise AdapterError(f"torchvision has no model {name!r}{suggestions(PREFIX + name, self.references())}")
        if not pretrained:
            return self._built(name)
        try:
            model: nn.Module = models.get_model(name, weights="DEFAULT")
        except Exception as error:
            raise AdapterError(
                f"the trained weights of {reference!r} could not be had ({type(error).__name__}: {error}). "
                "Is there a network? Without pretrained weights they are random."
            ) from error
        return model

    def _built(self, name: str, **options: Any) -> nn.Module:
        models = _models()
        # A backbone of its own would be fetched even where the model's weights are random.
        options |= {"weights_backbone": None} if "weights_backbone" in _arguments(name) else {}
        try:
            model: nn.Module = models.get_model(name, weights=None, **options)
        except Exception as error:
            raise AdapterError(f"torchvision could not build {name!r}: {type(error).__name__}: {error}") from error
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

    def records(self, model: nn.Module) -> Iterable[dict[str, Any]]:
        """The builders beside the model's class, with as many classes as its last layer has."""
        home = type(model).__module__
        if not home.startswith("torchvision.models."):
            return
        from torch import nn

        models = _models()
        count = sum(1 for _ in model.parameters())
        names = [n for n in models.list_models() if models.get_model_builder(n).__module__ == home]
        last = [m.out_features for m in model.modules() if isinstance(m, nn.Linear)]
        for name in names:
            record: dict[str, Any] = {"name": name, "options": {"num_classes": last[-1]} if last else {}}
            if sum(1 for _ in _on_meta(self.rebuild, record).parameters()) == count:
                yield record

    def rebuild(self, record: Mapping[str, Any]) -> nn.Module:
        """The builder's model with random weights; only builders that torchvision itself defines."""
        models = _models()
        name, options = str(record["name"]), dict(record["options"])
        # Users register builders of their own in the same table.
        known = name in models.list_models()
        if not known or not models.get_model_builder(name).__module__.startswith("torchvision.models."):
            raise AdapterError(f"torchvision has no builder {name!r}")
        with fenced():
            return self._built(name, **options)

    def references(self) -> Iterable[str]:
        """All of torchvision's models, quantised ones left out; none where torchvision is not installed."""
        if not installed("torchvision"):
            return []
        return [PREFIX + n for n in _models().list_models() if not n.startswith("quantized_")]


def _models() -> Any:
    return require("torchvision.models", "a model of torchvision", error=AdapterError)


def _on_meta(build: Callable[[Mapping[str, Any]], nn.Module], record: Mapping[str, Any]) -> nn.Module:
    import torch

    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        return build(record)


def _arguments(name: str) -> Iterable[str]:
    import inspect

    return inspect.signature(_models().get_model_builder(name)).parameters
