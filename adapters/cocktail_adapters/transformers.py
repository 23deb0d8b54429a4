"""transformers: models by type (``hf:bert``), local folder or hub name."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cocktailsdk.errors import AdapterError
from cocktailsdk.models import suggestions
from cocktailsdk.records import fenced

from .images import example_images

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["TransformersAdapter"]

PREFIX = "hf:"

_NOT_THE_MODELS = frozenset(
    ("_name_or_path", "architectures", "auto_map", "quantization_config", "transformers_version")
)
"""Of a configuration, what says nothing of the architecture: paths, other people's code, versions."""


class TransformersAdapter:
    """``hf:bert`` (default configuration), ``hf:path/to/folder``, ``hf:google/vit-base-patch16-224``.

    A configuration alone is enough: ``hf:path/to/config.json`` or a folder that holds one. The class is then the first
    that its ``architectures`` names (``LlamaForCausalLM``), else ``AutoModel``'s.
    """

    name = "transformers"

    def owns(self, reference: str) -> bool:
        """Everything that begins with ``hf:``."""
        return reference.startswith(PREFIX)

    def build(self, reference: str, *, pretrained: bool = False) -> nn.Module:
        """The model of a type, configuration file, folder or hub name; random weights unless ``pretrained``."""
        from transformers import AutoConfig, AutoModel

        name = reference.removeprefix(PREFIX)
        if not name:
            raise AdapterError("after 'hf:' comes a model type (hf:bert), a config.json, a folder or a hub name")
        types = _model_types()
        config_file = name.endswith(".json") and Path(name).is_file()
        if pretrained and config_file:
            raise AdapterError(f"{reference!r} is a configuration, which has no trained weights; name their folder")
        local = config_file or Path(name).is_dir()
        if name in types and not local:
            if pretrained:
                raise AdapterError(
                    f"{reference!r} is a model type, which has no trained weights of its own; name a folder or a model "
                    "on the hub"
                )
            try:
                model: nn.Module = AutoModel.from_config(AutoConfig.for_model(name))
            except Exception as error:
                raise AdapterError(
                    f"transformers could not build {name!r} from its default configuration "
                    f"({type(error).__name__}: {_first_line(error)})"
                ) from error
            return model
        if not local and "/" not in name:
            near = suggestions(PREFIX + name, [PREFIX + t for t in types])
            raise AdapterError(f"{name!r} is no model type of transformers, no folder here, and no hub name{near}")
        try:
            config = AutoConfig.from_pretrained(name)
            named = _named_class(config)
            if pretrained:
                model = (named or AutoModel).from_pretrained(name)
            else:
                model = named(config) if named is not None else AutoModel.from_config(config)
        except Exception as error:
            what = "weights" if pretrained else "configuration"
            where = "" if local else " Is there a network, and is HF_HUB_OFFLINE unset?"
            raise AdapterError(
                f"the {what} of {reference!r} could not be read ({type(error).__name__}: {_first_line(error)}).{where}"
            ) from error
        return model

    def example_inputs(self, model: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Keyword arguments that the model's forward pass takes: tokens, images or sound of the configured size."""
        if not type(model).__module__.startswith("transformers.") and not hasattr(model, "main_input_name"):
            return None
        config: Any = getattr(model, "config", None)
        if config is None:
            return None
        accepted = inspect.signature(model.forward).parameters
        main = getattr(model, "main_input_name", "input_ids")
        kwargs: dict[str, Any] = {}
        if main == "input_values":
            kwargs[main] = example_images((1, 16000))
        elif main == "input_features":
            frames = 2 * getattr(config, "max_source_positions", 500)
            kwargs[main] = example_images((1, getattr(config, "num_mel_bins", 80), frames))
        elif main == "past_values":
            kwargs[main] = example_images((1, config.context_length, getattr(config, "num_input_channels", 1)))
        elif main == "pixel_values":
            kwargs[main] = _pixels(config)
        else:
            kwargs["input_ids"] = _tokens(config)
            if "pixel_values" in accepted and hasattr(config, "vision_config"):
                kwargs["pixel_values"] = _pixels(config.vision_config)
        if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in accepted:
            kwargs["decoder_input_ids"] = _tokens(config, 8)
        if "use_cache" in accepted:
            kwargs["use_cache"] = False  # a cache is not part of what one forward pass computes
        return (), kwargs

    def records(self, model: nn.Module) -> Iterable[dict[str, Any]]:
        """The class and its configuration: as it is, and without what the configuration's class does not know.

        Checkpoints on the hub carry settings of tasks and of other programs, which no model reads.
        """
        transformers = sys.modules.get("transformers")  # nobody has such a model who has not imported it
        name = type(model).__name__
        if transformers is None or not type(model).__module__.startswith("transformers."):
            return
        if getattr(transformers, name, None) is not type(model):
            return
        own: Any = model.config
        config = _of_the_model(json.loads(own.to_json_string(use_diff=False)))
        yield {"class": name, "config": config}
        known = type(own)().to_dict()
        yield {"class": name, "config": {k: v for k, v in config.items() if k in known}}

    def rebuild(self, record: Mapping[str, Any]) -> nn.Module:
        """The class, made from the configuration; only model classes that transformers itself defines."""
        import transformers

        cls: Any = getattr(transformers, str(record["class"]), None)
        known = isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)
        if not known or not cls.__module__.startswith("transformers.models.") or cls.config_class is None:
            raise AdapterError(f"transformers has no model class {record['class']!r}")
        with fenced():
            made: nn.Module = cls(cls.config_class.from_dict(_of_the_model(record["config"])))
        return made

    def after_slim(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Lets ``save_pretrained`` write a slim model that a configuration describes, and refuse any other."""
        loaded = sys.modules.get("transformers.modeling_utils")  # nobody has such a model who has not imported it
        if loaded is not None and any(isinstance(m, loaded.PreTrainedModel) for m in model.modules()):
            from .transformers_slim import describe

            describe(model, args, kwargs)

    def without_elements(self, model: nn.Module, container: str, kept: Sequence[int], total: int) -> None:
        """Numbers a model's layers anew, for its cache, and counts them in its configuration."""
        loaded = sys.modules.get("transformers.modeling_utils")
        if loaded is not None and any(isinstance(m, loaded.PreTrainedModel) for m in model.modules()):
            from .transformers_layers import renumber

            renumber(model, container, kept, total)

    def references(self) -> Iterable[str]:
        """All model types."""
        return [PREFIX + t for t in _model_types()]


def _of_the_model(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration, and those inside it, without what says nothing of the architecture."""
    rest = {k: v for k, v in config.items() if k not in _NOT_THE_MODELS}
    return {k: _of_the_model(v) if isinstance(v, Mapping) else v for k, v in rest.items()}


def _model_types() -> list[str]:
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    return sorted(MODEL_MAPPING_NAMES)


def _named_class(config: Any) -> Any:
    """The class of transformers that a configuration names, ``None`` where it names none."""
    import transformers

    names = getattr(config, "architectures", None) or [""]
    found = getattr(transformers, names[0], None) if names[0] else None
    return found if hasattr(found, "from_pretrained") else None


def _pixels(config: Any) -> Tensor:
    size = getattr(config, "image_size", None) or 224
    height, width = (size, size) if isinstance(size, int) else tuple(size)[:2]
    channels = getattr(config, "num_channels", 3)
    frames = getattr(config, "num_frames", None)
    if isinstance(frames, int):
        return example_images((1, frames, channels, height, width))
    return example_images((1, channels, height, width))


def _tokens(config: Any, length: int = 16) -> Tensor:
    import torch

    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    words = getattr(text, "vocab_size", None) or 100
    # From 5 on, so that no token is one of the special ones that models treat apart.
    return (torch.arange(length) % max(words - 5, 1) + min(5, words - 1)).unsqueeze(0)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else "no message"
