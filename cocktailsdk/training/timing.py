"""When a run reports a step and when it saves; several processes agree on both."""

from __future__ import annotations

import time

from .distributed.ranks import Ranks
from .interrupt import Interrupts
from .settings import OutputSettings

__all__ = ["Timing"]


class Timing:
    """Clocks of a run's events and saves.

    Asking all processes takes a collective operation, so several processes ask only about as often as events are due.

    Args:
        output: How often to report and to save.
        ranks: The processes that share the run.
        interrupts: Whether the user asked to stop.
    """

    def __init__(self, output: OutputSettings, ranks: Ranks, interrupts: Interrupts) -> None:
        self._output, self._ranks, self._interrupts = output, ranks, interrupts
        now = time.monotonic()
        self._counted_until = self._saved_at = self._agreed_at = now
        self._reported_at = 0.0
        self._calls, self._next_agreement = 0, 1
        self._late = False

    def lap(self) -> float:
        """Seconds since this was called last, or since the run was opened."""
        now = time.monotonic()
        seconds, self._counted_until = now - self._counted_until, now
        return seconds

    def event_due(self) -> bool:
        """Whether it is time for a throttled event, or an interrupt waits for one."""
        if self._ranks.world == 1:
            return self._is_event_due() or self._interrupts.requested
        self._calls += 1
        if self._calls < self._next_agreement:
            return False
        due, self._late, self._next_agreement = self._ranks.from_main(self._agreement)
        self._calls = 0
        if self._ranks.any(self._interrupts.requested):
            self._interrupts.requested = True
        return due or self._interrupts.requested

    def save_due(self) -> bool:
        """Whether the last save is old enough for another one at the end of an epoch or the like."""
        least = min(self._output.save_seconds, 60 * self._output.save_minutes)
        return self._ranks.from_main(lambda: time.monotonic() - self._saved_at >= least)

    def save_late(self) -> bool:
        """Whether the last save is so old that the run saves wherever it is; as of :meth:`event_due` in several."""
        if self._ranks.world == 1:
            return self._is_save_late()
        late, self._late = self._late, False
        return late

    def saved(self) -> None:
        """Note that the run was saved."""
        self._saved_at = time.monotonic()

    def _is_event_due(self) -> bool:
        now = time.monotonic()
        if now - self._reported_at < self._output.event_seconds and not self._interrupts.requested:
            return False
        self._reported_at = now
        return True

    def _is_save_late(self) -> bool:
        return time.monotonic() - self._saved_at >= 60 * self._output.save_minutes

    def _agreement(self) -> tuple[bool, bool, int]:
        """Whether an event is due, whether a save is late, and after how many calls to ask again."""
        now = time.monotonic()
        seconds_per_call = max(now - self._agreed_at, 1e-6) / max(self._calls, 1)
        self._agreed_at = now
        calls = int(self._output.event_seconds / seconds_per_call)
        return self._is_event_due(), self._is_save_late(), min(max(calls, 1), 1000)
