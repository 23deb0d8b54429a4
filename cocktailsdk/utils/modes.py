"""Train and evaluation modes: put back as they were, and kept where the user froze something.

A module is *frozen* while it stays in evaluation mode when the model trains. Two things say so:

- the model's own ``train()`` leaves it there (an override of ``train``), or
- the model was handed over partly in train mode, and this module with all that is inside it was in evaluation mode.

A model handed over wholly in evaluation mode, as libraries load pretrained ones, says nothing: it trains as its own
``train()`` puts it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import Tensor, nn

__all__ = ["TrainingModes", "evaluating", "modes_restored", "train_as_handed"]


class TrainingModes:
    """The modes in which a model trains, by what it was handed over in.

    Args:
        model: As it was handed over.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._frozen: dict[nn.Module, None] = dict.fromkeys(_frozen_modules(model))

    @property
    def frozen(self) -> bool:
        """Whether anything is."""
        return bool(self._frozen)

    def observe(self) -> None:
        """Take the modes as they are now, while the user's own loop trains the model."""
        self._frozen = dict.fromkeys(_frozen_modules(self._model))

    def apply(self) -> None:
        """Put the model in them; what was frozen meanwhile (by a callback, say) is kept too."""
        self._frozen.update(dict.fromkeys(_frozen_modules(self._model)))
        self._model.train()
        for module in self._frozen:
            module.training = False


def train_as_handed(model: nn.Module) -> None:
    """Put a model in the modes in which it trains: its own ``train()``, without what is frozen."""
    TrainingModes(model).apply()


@contextlib.contextmanager
def modes_restored(model: nn.Module) -> Iterator[None]:
    """On leaving, every module has the mode that it had on entering."""
    modules = list(model.modules())
    before = [(module, module.training) for module in modules if hasattr(module, "training")]
    without = [module for module in modules if not hasattr(module, "training")]  # frozen TorchScript has no mode
    try:
        yield
    finally:
        for module, mode in before:
            module.training = mode  # not train(mode): a model may override it to leave modules alone
        for module in without:
            vars(module).pop("training", None)


@contextlib.contextmanager
def evaluating(model: nn.Module, *, clear_caches: bool = False) -> Iterator[None]:
    """Inside, every module is in evaluation mode; on leaving, every module has the mode that it had before.

    Args:
        model: The model.
        clear_caches: Whether modules drop what they cached in earlier runs in evaluation mode (a bias by device, say),
            on entering and on leaving.
    """
    with modes_restored(model):
        try:
            model.eval()
        except NotImplementedError:  # graphs of torch.export have one mode, and their eval() refuses
            for module in model.modules():
                if hasattr(module, "training"):
                    module.training = False
        if not clear_caches:
            yield
            return
        _clear_caches(model)
        try:
            yield
        finally:
            _clear_caches(model)


def _clear_caches(model: nn.Module) -> None:
    """Have modules drop their caches of tensors as they do it themselves, when they are put in train mode."""
    for module in model.modules():
        dicts = (value for name, value in vars(module).items() if isinstance(value, dict) and not name.startswith("_"))
        if any(isinstance(value, Tensor) for cache in dicts for value in cache.values()):
            module.train()
            module.eval()


def _frozen_modules(model: nn.Module) -> list[nn.Module]:
    """Modules that are in evaluation mode with all inside, where something else is in train mode."""
    trains: set[nn.Module] = set()
    _mark(model, trains, set())
    return [module for module in model.modules() if module not in trains] if trains else []


def _mark(module: nn.Module, trains: set[nn.Module], seen: set[nn.Module]) -> bool:
    """Note the modules that are in train mode, or hold one that is."""
    if module in seen:
        return module in trains
    seen.add(module)
    inside = [_mark(child, trains, seen) for child in module.children()]
    if module.training or any(inside):
        trains.add(module)
    return module in trains
