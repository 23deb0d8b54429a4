"""Text that anybody may have written, as it may be printed."""

from __future__ import annotations

from typing import Any

__all__ = ["all_printable", "printable"]

_KEPT = "\n\t"


def printable(text: str) -> str:
    r"""A text without what a terminal would obey: escapes, control and direction characters read like ``\x1b``.

    Line feeds and tabs stay. Nothing else is changed, letters of any script included.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in _KEPT else _escaped(c) for c in text)


def all_printable(value: Any) -> Any:
    """JSON values with all their texts, keys included, as :func:`printable` makes them."""
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, list):
        return [all_printable(v) for v in value]
    if isinstance(value, dict):
        return {printable(k): all_printable(v) for k, v in value.items()}
    return value


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
