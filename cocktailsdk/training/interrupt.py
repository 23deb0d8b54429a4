"""Ctrl-C during training: finish the step, save, then stop."""

from __future__ import annotations

import logging
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

__all__ = ["Interrupts"]

log = logging.getLogger(__name__)


class Interrupts:
    """While active, SIGINT only sets a flag; a second one interrupts at once.

    Signals are caught in the main thread alone, and only where the process does not ignore them. The handler
    that was there before is put back.

    Attributes:
        requested: Whether the user asked to stop.
    """

    def __init__(self) -> None:
        self.requested = False
        self._before: Any = None
        self._active = False

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.getsignal(signal.SIGINT)
            if self._before not in (signal.SIG_IGN, None):
                signal.signal(signal.SIGINT, self._handle)
                self._active = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._active:
            signal.signal(signal.SIGINT, self._before)
            self._active = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        log.warning("interrupted: finishing the current step and saving; interrupt again to stop at once")
