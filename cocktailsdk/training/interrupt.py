"""Ctrl-C and SIGTERM during training: finish the step, save, then stop."""

from __future__ import annotations

import logging
import os
import signal
import threading
from types import FrameType
from typing import Any

__all__ = ["Interrupts", "Stopped"]

log = logging.getLogger(__name__)

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(BaseException):
    """The run was asked to stop, and is where it can be gone on from. ``CoTrainer.fit`` saves and ends it."""


class Interrupts:
    """While active, SIGINT and SIGTERM only set a flag; a second one stops at once.

    Signals are caught in the main thread alone, and only where the process does not ignore them. The handlers
    that were there before are put back.

    Attributes:
        requested: Whether the run was asked to stop.
        again: Whether twice.
        number: The first signal's.
    """

    def __init__(self) -> None:
        self.requested = self.again = False
        self.number: int = signal.SIGINT
        self._before: dict[int, Any] = {}
        self._process = 0

    def __enter__(self) -> Interrupts:
        self._process = os.getpid()
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                before = signal.getsignal(number)
                if before not in (signal.SIG_IGN, None):
                    self._before[number] = before
                    signal.signal(number, self._handle)
        return self

    def __exit__(self, *failure: object) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)
        self._before = {}

    def error(self) -> BaseException:
        """What ends the run: ``KeyboardInterrupt``, or for SIGTERM ``SystemExit`` with the status 143, as of shells."""
        return SystemExit(128 + signal.SIGTERM) if self.number == signal.SIGTERM else KeyboardInterrupt()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a process that was forked off meanwhile is none of ours
            signal.signal(number, self._before.get(number, signal.SIG_DFL))
            os.kill(os.getpid(), number)
            return
        if self.requested:
            self.again, self.number = True, number
            raise self.error()
        self.requested, self.number = True, number
        name = "interrupted" if number == signal.SIGINT else signal.Signals(number).name
        log.warning("%s: finishing the current step and saving; once more stops at once", name)
