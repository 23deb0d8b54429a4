"""Arguments of training that are numbers, checked before anything is built."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from numbers import Integral, Real
from typing import Any

from ..errors import TrainingError

__all__ = ["check_numbers", "one_budget", "shortened"]

INTEGERS: Mapping[str, int | None] = {
    "count": 1,
    "epochs": 1,
    "total_steps": 1,
    "steps": 1,
    "steps_per_epoch": 1,
    "rounds": 1,
    "rewind_epoch": 0,
    "recalibration_batches": 1,
    "gradient_accumulation_steps": 1,
    "seed": None,
}
"""Whole numbers, and the least that each may be."""
RANGES: Mapping[str, tuple[str, Callable[[float], bool]]] = {
    **dict.fromkeys(("save_seconds", "save_minutes", "event_seconds"), ("at least 0", lambda x: x >= 0)),
    **dict.fromkeys(("total_hours", "max_grad_norm"), ("above 0, and finite", lambda x: 0 < x < math.inf)),
    "weight": ("in 0 … 1", lambda x: 0 <= x <= 1),
    "ema_decay": ("between 0 and 1", lambda x: 0 < x < 1),
}
"""What other numbers must be, and whether they are."""


def check_numbers(owner: str = "", /, **values: Any) -> None:
    """Check that arguments are numbers in their range; ``None`` stands for a default.

    Args:
        owner: What the names are of, for errors; a class of settings, say.
        **values: By name.

    Raises:
        TrainingError: One is not; names it, and what it must be.
    """
    for name, value in values.items():
        if value is not None and (rule := _broken_rule(name, value)) is not None:
            raise TrainingError(f"{owner}{name} must be {rule}, got {shortened(value)}")


def one_budget(**budgets: Any) -> None:
    """Check that at most one of several budgets is set.

    Raises:
        TrainingError: Several are.
    """
    several = [f"{name}={value}" for name, value in budgets.items() if value is not None]
    if len(several) > 1:
        *names, last = budgets
        raise TrainingError(f"give one of {', '.join(names)} and {last}; got {', '.join(several)}")


def _broken_rule(name: str, value: Any) -> str | None:
    """What a number must be and is not; ``None`` if it is."""
    if name in INTEGERS:
        least = INTEGERS[name]
        if not isinstance(value, Integral) or isinstance(value, bool):
            return "a whole number"
        return None if least is None or int(value) >= least else f"at least {least}"
    if not isinstance(value, Real) or isinstance(value, bool) or math.isnan(value):
        return "a number"
    rule, holds = RANGES.get(name, ("", lambda x: True))
    return None if holds(float(value)) else rule


def shortened(value: Any) -> str:
    """A value as text for an error, with its type unless it is a number."""
    text = repr(value).replace("\n", " ")
    kind = "" if isinstance(value, int | float) and not isinstance(value, bool) else f" ({type(value).__name__})"
    return f"{text[:60]}{'…' if len(text) > 60 else ''}{kind}"
