"""How patterns look in pictures: a colour for light and for dark paper, and a shape that says the same again."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from .run import RunReport

__all__ = ["DARK", "GRID", "INK", "PAPER", "Look", "looks_of"]

INK, GRID, PAPER = "#1f2328", "#d0d7de", "#ffffff"
"""Of light paper: text and axes, lines of the grid, the paper itself."""

DARK = {INK: "#e6edf3", GRID: "#3d444d", PAPER: "#0d1117"}
"""The same on dark paper."""


@dataclass(frozen=True)
class Look:
    """A pattern's.

    Attributes:
        light: Its colour on white paper, with a contrast of at least 3 to it.
        dark: Its colour on dark paper, likewise.
        marker: Its shape, as matplotlib names it.
    """

    light: str
    dark: str
    marker: str


# Hues after Okabe and Ito, told apart with any kind of colour vision; made darker and lighter for the contrast.
_KNOWN = {
    "dense": Look(INK, DARK[INK], "D"),
    "unstructured": Look("#0072b2", "#4aa8e0", "o"),
    "channel": Look("#b66a00", "#f0a83a", "s"),
    "n:m": Look("#007f5c", "#2cc08f", "^"),
}
_FURTHER = (
    Look("#b0508a", "#e39ac6", "v"),
    Look("#c24e00", "#ff8a4c", "P"),
    Look("#6a5acd", "#a79bff", "X"),
    Look("#757500", "#d6d14a", "p"),
    Look("#5f6b7a", "#9fb0c3", "h"),
)


def looks_of(reports: Iterable[RunReport]) -> dict[str, Look]:
    """A look for every pattern of some runs, the same in all of them; ``"dense"`` among them, and first."""
    patterns = dict.fromkeys(["dense", *(row.pattern for report in reports for row in report.networks)])
    further = [p for p in patterns if p not in _KNOWN]
    return {p: _KNOWN[p] if p in _KNOWN else _FURTHER[further.index(p) % len(_FURTHER)] for p in patterns}
