"""Numbers as people read them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

__all__ = ["bytes_text", "count_text", "duration_text", "flops_text", "json_values", "percent_text", "shape_text"]

_STEPS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def count_text(value: float) -> str:
    """``25.56 M``; three to four digits and the unit."""
    for size, unit in _STEPS:
        if abs(value) >= size:
            scaled = value / size
            return f"{scaled:.{2 if scaled < 100 else 1}f} {unit}"
    return f"{value:.0f}"


def flops_text(value: float) -> str:
    """``8.18 GFLOPs``."""
    number, _, unit = count_text(value).partition(" ")
    return f"{number} {unit}FLOPs"


def bytes_text(value: float) -> str:
    """``415.2 kB``, in powers of 1,000."""
    for size, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= size:
            return f"{value / size:.1f} {unit}"
    return f"{value:.0f} B"


def percent_text(share: float, digits: int = 1) -> str:
    """``91.7 %``."""
    return f"{100 * share:.{digits}f} %"


def duration_text(seconds: float) -> str:
    """``0:54``, ``12:03``, ``1:02:03``."""
    total = max(0, round(seconds))
    hours, rest = divmod(total, 3600)
    minutes, seconds = divmod(rest, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def shape_text(shape: tuple[int, ...] | list[int]) -> str:
    """``64x3x7x7``."""
    return "x".join(map(str, shape)) or "scalar"


def json_values(value: Any) -> Any:
    """Nested containers with ``None`` for what is infinite or NaN, which JSON lacks."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: json_values(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)([json_values(v) for v in value])
    return value
