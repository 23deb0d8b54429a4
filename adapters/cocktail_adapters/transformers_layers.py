"""Models of transformers with fewer layers: configurations count them, and caches number them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

__all__ = ["renumber"]

NUMBERS = ("layer_idx", "layer_id")
"""Attributes in which a module keeps the number of its layer, by which it finds its part of a cache."""

INDICES = ("mlp_only_layers",)
"""Settings that list layers by their numbers."""

LEADING = ("first_k_dense_replace",)
"""Settings that say how many of the first layers are of another kind."""

SIDES = {"encoder": ("encoder_layers", "num_layers"), "decoder": ("decoder_layers", "num_decoder_layers")}
"""What the configuration of a model with encoder and decoder calls the number of layers of each."""


def renumber(model: nn.Module, container: str, kept: Sequence[int], total: int) -> None:
    """Gives layers that moved up in their list their new numbers, and configurations the new count.

    Args:
        model: The model, changed in place.
        container: Path of the list.
        kept: Where each of its elements was before.
        total: How many there were.
    """
    for new, layer in enumerate(model.get_submodule(container).children()):
        for module in layer.modules():
            for name in NUMBERS:
                if type(vars(module).get(name)) is int and vars(module)[name] == kept[new]:
                    setattr(module, name, new)
    side = "decoder" if "decoder" in container.split(".") else "encoder"
    for config in _configurations(model, container):
        both = getattr(config, "is_encoder_decoder", False)
        names = [n for n in (SIDES[side] if both else ("num_hidden_layers",)) if getattr(config, n, None) == total]
        for name in names[:1]:
            setattr(config, name, len(kept))
        if names:
            _keep(config, kept, total)


def _configurations(model: nn.Module, container: str) -> Iterator[Any]:
    """Those of the models of transformers around a list, each once; models share theirs with the models in them."""
    from transformers import PreTrainedModel

    seen: set[int] = set()
    for path, module in model.named_modules():
        around = not path or container == path or container.startswith(f"{path}.")
        if around and isinstance(module, PreTrainedModel) and id(module.config) not in seen:
            seen.add(id(module.config))
            yield module.config


def _keep(config: Any, kept: Sequence[int], total: int) -> None:
    """Of settings that differ from layer to layer, those of the layers that are kept."""
    for name, value in list(vars(config).items()):
        if name in LEADING and type(value) is int:
            setattr(config, name, sum(i < value for i in kept))
        elif not isinstance(value, list):
            continue
        elif name in INDICES:
            setattr(config, name, [kept.index(i) for i in value if i in kept])
        elif "layer" in name and len(value) == total:
            setattr(config, name, [value[i] for i in kept])
