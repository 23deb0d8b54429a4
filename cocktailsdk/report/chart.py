"""What a chart shows, as plain data: drawn for papers and for the page alike, and told in a table behind it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Chart", "Mark", "Series", "Table"]


@dataclass(frozen=True)
class Mark:
    """A point that can be hovered over and gone to with the keyboard.

    Attributes:
        x: Where.
        y: Where.
        description: The text of its tooltip, in lines.
        hollow: Whether it is drawn as an outline: a bound, not a measurement.
        strong: Whether it stands out: on the front, or chosen.
        note: A few characters printed beside it.
    """

    x: float
    y: float
    description: str
    hollow: bool = False
    strong: bool = False
    note: str = ""


@dataclass(frozen=True)
class Series:
    """Points that belong together.

    Attributes:
        label: What they are.
        pattern: Whose look they have; empty for none's.
        marks: Points with something to say.
        line: Corners of a line through or beside them; none where they are not joined.
        network: The one network that all of it is about, if it is one.
        networks: A network for each mark, where they differ.
    """

    label: str
    pattern: str = ""
    marks: tuple[Mark, ...] = ()
    line: tuple[tuple[float, float], ...] = ()
    network: str = ""
    networks: tuple[str, ...] = ()

    def network_of(self, mark: int) -> str:
        """The network that a mark is about, or nothing."""
        return self.networks[mark] if self.networks else self.network


@dataclass(frozen=True)
class Table:
    """The same as text.

    Attributes:
        columns: Their names.
        rows: As many texts in each; the first names the row.
        networks: Of each row the network, or nothing.
        patterns: Of each row the pattern, or nothing.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    networks: tuple[str, ...] = ()
    patterns: tuple[str, ...] = ()


@dataclass(frozen=True)
class Chart:
    """A chart.

    Attributes:
        name: Short, of letters, digits and dashes: its file's and its element's.
        title: Above it.
        summary: What it shows, in a sentence, for those who do not see it.
        x: What is to the right.
        y: What is up.
        series: What is drawn.
        level: A horizontal line, and what it is.
        log_y: Whether the upward axis is logarithmic.
        integer_x: Whether the values to the right are whole numbers.
        splits: Vertical lines: where one thing ends and the next begins.
        y_range: Fixed limits.
        table: The same as text.
    """

    name: str
    title: str
    summary: str
    x: str
    y: str
    series: tuple[Series, ...]
    table: Table
    level: tuple[float, str] | None = None
    log_y: bool = False
    integer_x: bool = False
    splits: tuple[float, ...] = ()
    y_range: tuple[float, float] | None = None

    def points(self) -> Sequence[tuple[float, float]]:
        """All that is drawn, for limits."""
        return [p for s in self.series for p in (*s.line, *((m.x, m.y) for m in s.marks))]
