"""The last minutes, a row for each second, for the live page."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import asdict, dataclass
from typing import Any

from .engine import Answer, Engine

__all__ = ["History", "Second"]


@dataclass(frozen=True)
class Second:
    """What happened in one second.

    Attributes:
        number: Of the second, from 0.
        answered: Requests answered.
        refused: Requests that got an answer of another kind.
        p50: Milliseconds from a request's arrival to its answer, the median; ``None`` where none was answered.
        p95: The 95th percentile.
        queue: Requests that wait at its end.
        network: The active network at its end.
        accuracy: That network's metric in the bundle.
    """

    number: int
    answered: int
    refused: int
    p50: float | None
    p95: float | None
    queue: int
    network: str
    accuracy: float | None


class History:
    """Watches an engine."""

    def __init__(self, engine: Engine, seconds: int = 600) -> None:
        self._engine = engine
        self._rows: deque[Second] = deque(maxlen=seconds)
        self._latencies: list[float] = []
        self._refused = self._number = 0
        self._ends: float | None = None

    def answered(self, answer: Answer, latency: float) -> None:
        """A request was answered."""
        self._latencies.append(latency)

    def refused(self, status: int) -> None:
        """A request got an answer of another kind."""
        self._refused += 1

    def switched(self, before: str, after: str) -> None:
        """Nothing: the row says at its end what is active."""

    def looked(self, now: float) -> None:
        """Close the second when it is over."""
        if self._ends is None:
            self._ends = now + 1
        if now < self._ends:
            return
        network, found = self._engine.active, sorted(self._latencies)
        self._rows.append(
            Second(
                number=self._number,
                answered=len(found),
                refused=self._refused,
                p50=_rank(found, 0.5),
                p95=_rank(found, 0.95),
                queue=self._engine.waiting,
                network=network.name,
                accuracy=network.accuracy,
            )
        )
        self._latencies, self._refused, self._number = [], 0, self._number + 1
        self._ends = max(self._ends + 1, now)

    def after(self, number: int) -> list[dict[str, Any]]:
        """The seconds after one, as JSON values."""
        return [asdict(row) for row in self._rows if row.number > number]


def _rank(ordered: list[float], share: float) -> float | None:
    """The smallest that so many are no larger than, in milliseconds."""
    return round(1e3 * ordered[math.ceil(share * len(ordered)) - 1], 3) if ordered else None
