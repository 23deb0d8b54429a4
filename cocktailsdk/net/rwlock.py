"""Forward passes and changes of a model's tensors, kept apart when several threads use one net."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

from ..errors import SubnetError

__all__ = ["Gate"]


class Gate:
    """Lets any number of readers in at once, and one writer alone.

    A writer comes in two steps: :meth:`changing` keeps other writers out while readers go on (what takes long is done
    there), :meth:`alone` waits for the readers to leave and lets no others in. A writer that waits goes before readers
    that come later. Both may be nested, and a writer may read; a reader may not write. Copies have gates of their own.
    """

    def __init__(self) -> None:
        self._turn = threading.Condition()
        self._readers: dict[int, int] = {}  # how many times each thread is in
        self._writer: int | None = None
        self._depth = self._alone = 0

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Nothing is changed by another thread inside."""
        me = threading.get_ident()
        with self._turn:
            if self._writer != me and me not in self._readers:
                while self._alone:
                    self._turn.wait()
            self._readers[me] = self._readers.get(me, 0) + 1
        try:
            yield
        finally:
            with self._turn:
                self._readers[me] -= 1
                if not self._readers[me]:
                    del self._readers[me]
                    self._turn.notify_all()

    @contextlib.contextmanager
    def changing(self) -> Iterator[None]:
        """No other thread changes anything inside.

        Raises:
            SubnetError: This thread is reading.
        """
        me = threading.get_ident()
        with self._turn:
            if self._writer != me:
                if me in self._readers:
                    raise SubnetError(
                        "a request sees one subnet from start to end: switch before it or after it, not in a forward "
                        "pass or within `with net.hold():`"
                    )
                while self._writer is not None:
                    self._turn.wait()
                self._writer = me
            self._depth += 1
        try:
            yield
        finally:
            with self._turn:
                self._depth -= 1
                if not self._depth:
                    self._writer = None
                    self._turn.notify_all()

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """No other thread changes or reads anything inside.

        Raises:
            SubnetError: This thread is reading.
        """
        me = threading.get_ident()
        with self.changing():
            with self._turn:
                if me in self._readers:
                    raise SubnetError("a forward pass goes on in this thread: switch before it or after it")
                self._alone += 1
                try:
                    while self._readers:
                        self._turn.wait()
                except BaseException:
                    self._left()
                    raise
            try:
                yield
            finally:
                with self._turn:
                    self._left()

    def _left(self) -> None:
        self._alone -= 1
        if not self._alone:
            self._turn.notify_all()

    def __deepcopy__(self, memo: dict[int, Any]) -> Gate:
        return Gate()

    def __reduce__(self) -> tuple[type[Gate], tuple[()]]:
        return Gate, ()
