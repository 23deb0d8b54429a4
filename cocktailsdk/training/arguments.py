"""Arguments of training that are numbers, checked before anything is built."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from numbers import Integral, Real
from os import PathLike
from typing import Any

from ..errors import TrainingError

__all__ = ["check_kinds", "check_numbers", "one_budget"]

WHOLE: Mapping[str, int | None] = {
    "epochs": 1,
    "total_steps": 1,
    "steps": 1,
    "steps_per_epoch": 1,
    "rounds": 1,
    "rewind_epoch": 0,
    "recalibration_batches": 1,
    "accumulate": 1,
    "seed": None,
}
"""Whole numbers, and the least that each may be."""
NOT_NEGATIVE = ("save_seconds", "save_minutes", "event_seconds")
"""Numbers of at least 0."""
POSITIVE = ("total_hours", "clip_norm")
"""Numbers above 0."""


def check_numbers(**given: Any) -> None:
    """See that arguments are numbers that make sense; ``None`` stands for a default.

    Raises:
        TrainingError: One is none; names it, and what it must be.
    """
    for name, value in given.items():
        if value is None:
            continue
        if (rule := _broken(name, value)) is not None:
            raise TrainingError(f"{name} must be {rule}, got {_short(value)}")


def check_kinds(*, alphas: Any, callbacks: Any, out_dir: Any) -> None:
    """See that what is not one number is what it must be.

    Raises:
        TrainingError: One is not; names it.
    """
    numbers = isinstance(alphas, Iterable) and not isinstance(alphas, str)
    if not numbers or not all(isinstance(a, Real) and not isinstance(a, bool) for a in alphas):
        raise TrainingError(f"alphas must be numbers in (0, 1], like (1.0, 0.5), got {_short(alphas)}")
    if not isinstance(callbacks, Iterable):
        raise TrainingError(f"callbacks must be a list of functions, got {_short(callbacks)}")
    if out_dir is not None and (not isinstance(out_dir, str | PathLike) or not str(out_dir)):
        raise TrainingError(f"out_dir must be a folder's path, got {_short(out_dir)}")


def one_budget(**given: Any) -> None:
    """See that at most one of several budgets is given.

    Raises:
        TrainingError: Several are.
    """
    several = [f"{name}={value}" for name, value in given.items() if value is not None]
    if len(several) > 1:
        *names, last = given
        raise TrainingError(f"give one of {', '.join(names)} and {last}; got {', '.join(several)}")


def _broken(name: str, value: Any) -> str | None:
    """What a number must be and is not; ``None`` where it is."""
    if name in WHOLE:
        least = WHOLE[name]
        if not isinstance(value, Integral) or isinstance(value, bool):
            return "a whole number"
        return None if least is None or int(value) >= least else f"at least {least}"
    if not isinstance(value, Real) or isinstance(value, bool) or math.isnan(value):
        return "a number"
    number = float(value)
    if name in NOT_NEGATIVE:
        return None if number >= 0 else "at least 0"
    return "above 0, and finite" if name in POSITIVE and not 0 < number < math.inf else None


def _short(value: Any) -> str:
    text = repr(value).replace("\n", " ")
    kind = "" if isinstance(value, int | float) and not isinstance(value, bool) else f" ({type(value).__name__})"
    return f"{text[:60]}{'…' if len(text) > 60 else ''}{kind}"
