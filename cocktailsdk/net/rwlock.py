"""A read-write lock: forward passes read a model's tensors, switching writes them."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

from ..errors import SubnetError

__all__ = ["ReadWriteLock"]


class ReadWriteLock:
    """Any number of readers at once, or one writer alone. Reentrant, and waiting writers go before new readers.

    A writer can lock in two steps. :meth:`update` excludes other writers while readers go on: slow work that changes
    nothing a reader sees is done there. :meth:`write` also waits for the readers to leave and lets no new ones in.

    A thread may nest each of them, and may read while it writes. A reader cannot become a writer: two readers that
    both wanted to would wait for each other forever, so this raises an error. Copies and unpickled locks are unlocked.
    """

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._readers: dict[int, int] = {}  # by thread, how many read() blocks it is in
        self._writer: int | None = None  # the thread inside update() or write()
        self._updates = 0  # nested update() blocks of the writer, those of write() included
        self._writes = 0  # nested write() blocks of the writer, the one that waits for readers included

    @contextlib.contextmanager
    def read(self) -> Iterator[None]:
        """No other thread writes inside this block."""
        me = threading.get_ident()
        with self._condition:
            # A thread that reads or writes already must not wait for a writer, which may be waiting for this thread.
            if self._writer != me and me not in self._readers:
                while self._writes:
                    self._condition.wait()
            self._readers[me] = self._readers.get(me, 0) + 1
        try:
            yield
        finally:
            with self._condition:
                self._readers[me] -= 1
                if not self._readers[me]:
                    del self._readers[me]
                    self._condition.notify_all()

    @contextlib.contextmanager
    def update(self) -> Iterator[None]:
        """No other thread updates or writes inside this block; others may read.

        Raises:
            SubnetError: This thread is reading.
        """
        me = threading.get_ident()
        with self._condition:
            if self._writer != me:
                if me in self._readers:
                    raise SubnetError(
                        "a request sees one subnet from start to end: switch before it or after it, not in a forward "
                        "pass or within `with net.hold():`"
                    )
                while self._writer is not None:
                    self._condition.wait()
                self._writer = me
            self._updates += 1
        try:
            yield
        finally:
            with self._condition:
                self._updates -= 1
                if not self._updates:
                    self._writer = None
                    self._condition.notify_all()

    @contextlib.contextmanager
    def write(self) -> Iterator[None]:
        """No other thread reads, updates or writes inside this block.

        Raises:
            SubnetError: This thread is reading.
        """
        me = threading.get_ident()
        with self.update():
            with self._condition:
                if me in self._readers:  # it reads inside its own update(), which update() allows
                    raise SubnetError("a forward pass goes on in this thread: switch before it or after it")
                # Counted before the wait: from now on new readers wait, so a stream of them cannot starve this writer.
                self._writes += 1
                try:
                    while self._readers:
                        self._condition.wait()
                except BaseException:  # Ctrl-C while waiting
                    self._end_write()
                    raise
            try:
                yield
            finally:
                with self._condition:
                    self._end_write()

    def _end_write(self) -> None:
        self._writes -= 1
        if not self._writes:
            self._condition.notify_all()

    def __deepcopy__(self, memo: dict[int, Any]) -> ReadWriteLock:
        return ReadWriteLock()

    def __reduce__(self) -> tuple[type[ReadWriteLock], tuple[()]]:
        return ReadWriteLock, ()
