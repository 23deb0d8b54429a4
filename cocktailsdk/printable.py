"""Text that anybody may have written, as it may be printed."""

from __future__ import annotations

__all__ = ["printable"]

_KEPT = "\n\t"


def printable(text: str) -> str:
    r"""A text without what a terminal would obey: escapes, control and direction characters read like ``\x1b``.

    Line feeds and tabs stay. Nothing else is changed, letters of any script included.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in _KEPT else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
