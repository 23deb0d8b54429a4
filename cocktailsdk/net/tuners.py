"""Layers of adapters (LoRA and the like): their own weights are not pruned, and no merge goes into a masked weight."""

from __future__ import annotations

import sys
import weakref
from typing import Any

from torch import nn

from ..errors import SubnetError

__all__ = ["MergeGuard", "adapter_caches", "adapter_weights", "rank_modules", "tuner_layers"]

_LOW_RANK = "lora_"  # how parts of LoRA layers are called in peft, loralib, torchtune and diffusers


def tuner_layers(model: nn.Module) -> dict[str, Any]:
    """The layers of a model that peft has put adapters on, by path; none where peft is not loaded."""
    module = sys.modules.get("peft.tuners.tuners_utils")
    kind = getattr(module, "BaseTunerLayer", None)
    return {} if kind is None else {path: m for path, m in model.named_modules() if isinstance(m, kind)}


def adapter_caches(model: nn.Module) -> list[dict[str, Any]]:
    """The caches of DoRA layers: norms of weights that they adapt, inside ``peft.helpers.DoraCaching``.

    Whoever changes the weights must clear them.
    """
    # peft has no public way to clear them. ``test_net_tuners.py`` fails if a release renames the cache.
    inner = (m for layer in tuner_layers(model).values() for m in layer.modules())
    return [cache for m in inner if isinstance(cache := getattr(m, "_dora_cache", None), dict)]


def adapter_weights(model: nn.Module) -> frozenset[str]:
    """Names of the parameters that belong to adapters and not to the model underneath."""
    inside = tuple(
        f"{path}.{name}.".lstrip(".")
        for path, layer in tuner_layers(model).items()
        for name in layer.adapter_layer_names
    )
    return frozenset(
        name
        for name, _ in model.named_parameters(remove_duplicate=False)
        if f"{name}.".startswith(inside) or any(part.lower().startswith(_LOW_RANK) for part in name.split("."))
    )


def rank_modules(model: nn.Module) -> frozenset[str]:
    """Paths of the modules whose outputs are the ranks of an adapter rather than channels of the model."""
    names = {name.rpartition(".")[0] for name in adapter_weights(model)}
    return frozenset(n for n in names if any(_makes_ranks(part.lower()) for part in n.split(".")))


def _makes_ranks(part: str) -> bool:
    return part.startswith(_LOW_RANK) and part.endswith(("_a", "_down"))


class MergeGuard:
    """Refuses merges of adapters while a subnetwork is active: what is added would fill its masked weights.

    ``merge`` of every adapted layer is hidden by an object that raises, and is back when the guard is lifted. Copies of
    the model made meanwhile merge as ever.

    Args:
        model: The user's own.
    """

    def __init__(self, model: nn.Module) -> None:
        self._layers = list(tuner_layers(model).values())

    def arm(self, name: str) -> None:
        """Refuse from now on, in the name of a subnetwork."""
        # An attribute of the instance hides the method of its class (peft 0.21); deleting it brings the method back.
        for layer in self._layers:
            layer.__dict__["merge"] = _Refusal(layer, name)

    def lift(self) -> None:
        """Let adapters merge."""
        for layer in self._layers:
            if isinstance(layer.__dict__.get("merge"), _Refusal):
                del layer.__dict__["merge"]


class _Refusal:
    """Stands for the ``merge`` of one layer."""

    def __init__(self, layer: Any, name: str) -> None:
        self._layer, self._name = weakref.ref(layer), name

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        raise SubnetError(
            f"adapters cannot be merged while {self._name!r} is active: what they add would fill its masked weights. "
            "net.switch('dense') first, merge, and call sparsify() on the merged model"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        layer: Any = self._layer()
        layer = memo.get(id(layer), layer)
        return type(layer).merge.__get__(layer)

    def __reduce__(self) -> Any:
        return getattr, (self._layer(), "merge")  # found in the class: a file needs nothing of this package
