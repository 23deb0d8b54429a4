"""Keywords of :class:`~cocktailsdk.CoTrainer`: those of the version before work once more, others are refused."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from .options import TrainerArguments
from .settings import GROUPS

__all__ = ["MOVED", "current_keywords"]

MOVED: Mapping[str, tuple[str, str]] = {
    "distill_weight": ("distillation", "weight"),
    "distill_fn": ("distillation", "loss_fn"),
    "rounds": ("rounds", "count"),
    "rewind_epoch": ("rounds", "rewind_epoch"),
    "rewind_schedule": ("rounds", "rewind_schedule"),
    "merge": ("rounds", "merge"),
    "alphas": ("rounds", "alphas"),
    "metric_mode": ("evaluation", "metric_mode"),
    "recalibration_batches": ("evaluation", "recalibration_batches"),
    "forward_fn": ("batches", "forward_fn"),
    "steps_per_epoch": ("batches", "steps_per_epoch"),
    "shard_loader": ("batches", "shard_loader"),
    "accelerator": ("execution", "accelerator"),
    "mixed_precision": ("execution", "mixed_precision"),
    "accumulate": ("execution", "gradient_accumulation_steps"),
    "clip_norm": ("execution", "max_grad_norm"),
    "ema": ("execution", "ema_decay"),
    "sync_batch_norm": ("execution", "sync_batch_norm"),
    "on_nan": ("execution", "on_nan"),
    "save_seconds": ("output", "save_seconds"),
    "save_minutes": ("output", "save_minutes"),
    "event_seconds": ("output", "event_seconds"),
    "config": ("output", "config"),
}
"""Deprecated keywords: the group that has each now, and its name there."""
_TOP = {f.name for f in fields(TrainerArguments)} - {"train_loader", "loss_fn", "settings"} | GROUPS.keys()
_SETTINGS = {f.name: group for group, kind in GROUPS.items() for f in fields(kind)}


def current_keywords(
    keywords: Mapping[str, Any], groups: Mapping[str, Any] | None = None, *, caller: str, stacklevel: int = 3
) -> dict[str, Any]:
    """Keyword arguments with deprecated ones moved into their groups.

    Args:
        keywords: As the user gave them.
        groups: Groups in which deprecated keywords change single settings; by default those with all defaults.
        caller: What the user called, for messages.
        stacklevel: Of the warnings, as :func:`warnings.warn` takes it, seen from here.

    Raises:
        TypeError: A keyword is unknown, or a group and a deprecated keyword of it are both given.
    """
    current: dict[str, Any] = {}
    deprecated: dict[str, dict[str, Any]] = {}
    for name, value in keywords.items():
        # `rounds` names both a group and a number of the version before
        if name in GROUPS and value is None:  # as if it had been left out: the defaults, or the preset's settings
            continue
        if name in MOVED and not (name in GROUPS and (value is None or isinstance(value, GROUPS[name]))):
            deprecated.setdefault(MOVED[name][0], {})[name] = value
        elif name in _TOP:
            current[name] = value
        else:
            raise TypeError(f"{caller}() got an unexpected keyword argument {name!r}{_nearest(name)}")
    for group, moved in deprecated.items():
        settings = {MOVED[name][1]: value for name, value in moved.items()}
        base = (groups or {}).get(group)
        changed = GROUPS[group](**settings) if base is None else replace(base, **settings)
        new = f"{group}={GROUPS[group].__name__}({_written({**_chosen(base), **settings})})"
        if current.get(group) is not None:
            raise TypeError(
                f"{caller}() got {group}= and the deprecated {', '.join(moved)}: write {new} with all settings in it"
            )
        warnings.warn(
            f"{caller}({_written(moved)}) is {caller}({new}) now; the old keywords go with the next version",
            DeprecationWarning,
            stacklevel=stacklevel,
        )
        current[group] = changed
    return current


def _chosen(group: Any) -> dict[str, Any]:
    """The settings of a group that are not the defaults."""
    return {} if group is None else {f.name: v for f in fields(group) if (v := getattr(group, f.name)) != f.default}


def _nearest(name: str) -> str:
    """What was probably meant by an unknown keyword."""
    found = difflib.get_close_matches(name, [*_TOP, *_SETTINGS, *MOVED], n=1)
    if not found:
        return f"; it takes {', '.join(sorted(_TOP))}"
    if found[0] in _TOP:
        return f"; did you mean {found[0]}=?"
    group, setting = MOVED.get(found[0]) or (_SETTINGS[found[0]], found[0])
    return f"; did you mean {group}={GROUPS[group].__name__}({setting}=...)?"


def _written(values: Mapping[str, Any]) -> str:
    """Keyword arguments as they are typed; what cannot be typed is shown by its name, or as ``...``."""
    return ", ".join(f"{name}={_typed(value)}" for name, value in values.items())


def _typed(value: Any) -> str:
    plain = value is None or isinstance(value, bool | int | float | str | tuple | list | dict)
    text = repr(value) if plain else getattr(value, "__name__", "...")
    return text if len(text) <= 60 and text.isprintable() and text != "<lambda>" else "..."
