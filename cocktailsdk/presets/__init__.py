"""Presets: a model, data and settings that train together with one command.

Example:
    ```python
    from cocktailsdk.presets import get_preset

    net, trainer, loaders = get_preset("digits").prepare(out_dir="runs/digits")
    trainer.fit()
    print(trainer.evaluate(loaders.test))
    ```
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any

from ..errors import TrainingError
from . import digits
from .base import Loaders, Prepared, Preset
from .images import cifar10_preset, fashion_mnist_preset

__all__ = ["PRESETS", "Loaders", "Prepared", "Preset", "get_preset"]

PRESETS: dict[str, Callable[..., Preset]] = {
    "digits": digits.preset,
    "cifar10": cifar10_preset,
    "fashion-mnist": fashion_mnist_preset,
}
"""Makers of presets by name."""


def get_preset(name: str, **settings: Any) -> Preset:
    """A preset by name.

    Args:
        name: ``"digits"``, ``"cifar10"`` or ``"fashion-mnist"``.
        **settings: Those of the preset: all take ``weights``, ``start`` and ``recipe``, the image sets also ``model``
            and ``epochs_scale``. ``None`` stands for the default.

    Raises:
        TrainingError: For an unknown name or setting.
    """
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise TrainingError(f"no preset {name!r}{hint}: there are {', '.join(PRESETS)}")
    make = PRESETS[name]
    passed = {key: value for key, value in settings.items() if value is not None}
    known = make.__kwdefaults__ or {}
    if unknown := sorted(passed.keys() - known.keys()):
        raise TrainingError(
            f"preset {name!r} has no setting {', '.join(map(repr, unknown))}: it takes {', '.join(known) or 'none'}"
        )
    return make(**passed)
