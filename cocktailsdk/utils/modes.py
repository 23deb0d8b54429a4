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

from torch import nn

from .norms import Norm, running_norms

__all__ = ["TrainingModes", "frozen_norms", "modes_kept", "train_as_handed"]


class TrainingModes:
    """The modes in which a model trains, by what it was handed over in.

    Args:
        model: As it was handed over.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._frozen: dict[nn.Module, None] = dict.fromkeys(_left_in_evaluation(model))

    @property
    def frozen(self) -> bool:
        """Whether anything is."""
        return bool(self._frozen)

    def observe(self) -> None:
        """Take the modes as they are now, while the user's own loop trains the model."""
        self._frozen = dict.fromkeys(_left_in_evaluation(self._model))

    def apply(self) -> None:
        """Put the model in them; what was frozen meanwhile (by a callback, say) is kept too."""
        self._frozen.update(dict.fromkeys(_left_in_evaluation(self._model)))
        self._model.train()
        for module in self._frozen:
            module.training = False


def train_as_handed(model: nn.Module) -> None:
    """Put a model in the modes in which it trains: its own ``train()``, without what is frozen."""
    TrainingModes(model).apply()


@contextlib.contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """On leaving, every module is in the mode in which it was."""
    before = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, mode in before:
            module.training = mode


def frozen_norms(model: nn.Module) -> dict[str, Norm]:
    """The norms whose running statistics training leaves alone, by path.

    Besides frozen modules, norms with ``momentum=0``, and those whose ``track_running_stats`` was set to false though
    they have statistics.
    """
    with modes_kept(model):
        train_as_handed(model)
        return {
            path: norm
            for path, norm in running_norms(model).items()
            if not norm.training or norm.momentum == 0 or not norm.track_running_stats
        }


def _left_in_evaluation(model: nn.Module) -> list[nn.Module]:
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
