"""timm: image models by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from cocktailsdk.errors import AdapterError
from cocktailsdk.models import suggestions
from cocktailsdk.records import fenced

from .images import example_images

if TYPE_CHECKING:
    from torch import nn

__all__ = ["TimmAdapter"]

PREFIX = "timm:"


class TimmAdapter:
    """``resnet50``, ``vit_tiny_patch16_224.augreg_in21k``; ``timm:resnet50`` says the same."""

    name = "timm"

    def owns(self, reference: str) -> bool:
        """Bare names that timm knows, and everything that begins with ``timm:``."""
        if reference.startswith(PREFIX):
            return True
        if ":" in reference or "/" in reference:
            return False
        import timm

        return bool(timm.is_model(reference))

    def build(self, reference: str, *, pretrained: bool = False) -> nn.Module:
        """The model with random weights, or with those that timm fetches from the hub."""
        import timm

        name = reference.removeprefix(PREFIX)
        if not timm.is_model(name):
            raise AdapterError(f"timm has no model {name!r}{suggestions(name, self.references())}")
        try:
            model: nn.Module = timm.create_model(name, pretrained=pretrained)
        except Exception as error:
            if not pretrained:
                raise AdapterError(f"timm could not build {name!r}: {type(error).__name__}: {error}") from error
            raise AdapterError(
                f"the trained weights of {name!r} could not be had from the hub ({type(error).__name__}: {error}). "
                "Is there a network, and is HF_HUB_OFFLINE unset? Without pretrained weights they are random."
            ) from error
        return model

    def example_inputs(self, model: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """One image of the size that the model was configured for."""
        config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
        size = config.get("input_size") if isinstance(config, dict) else getattr(config, "input_size", None)
        if not isinstance(size, tuple | list):
            return None
        return (example_images((1, *size)),), {}

    def records(self, model: nn.Module) -> Iterable[dict[str, Any]]:
        """The architecture's name, and where they differ from its own the numbers of classes and input channels."""
        config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
        name = config.get("architecture") if isinstance(config, dict) else getattr(config, "architecture", None)
        if not name or not type(model).__module__.startswith("timm."):
            return
        options: dict[str, Any] = {}
        yield {"name": name, "options": dict(options)}
        for argument, value in (
            ("num_classes", getattr(model, "num_classes", None)),
            ("in_chans", next((p.shape[1] for p in model.parameters() if p.ndim == 4), None)),
        ):
            if value is not None:
                options[argument] = int(value)
                yield {"name": name, "options": dict(options)}

    def rebuild(self, record: Mapping[str, Any]) -> nn.Module:
        """The architecture with random weights; only architectures that timm itself defines."""
        import timm

        name, options = str(record["name"]), dict(record["options"])
        # Users register architectures of their own in the same table.
        if not timm.is_model(name) or not timm.models.model_entrypoint(name).__module__.startswith("timm."):
            raise AdapterError(f"timm {timm.__version__} has no architecture {name!r}")
        with fenced():
            model: nn.Module = timm.create_model(name, pretrained=False, **options)
        return model

    def references(self) -> Iterable[str]:
        """All of timm's architectures."""
        import timm

        names: list[str] = timm.list_models()
        return names
