"""The web server: uvicorn, with a limit on how long a request's head may take."""

from __future__ import annotations

import asyncio
from typing import Any

import h11
import uvicorn
from fastapi import FastAPI
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from .answers import Lingering
from .settings import Limits

__all__ = ["server_of"]


class _Protocol(H11Protocol):
    """uvicorn waits for a request's head for as long as a client likes; this does not."""

    head_seconds: float
    most: int
    open: dict[_Protocol, None]  # all of the server, the oldest first
    _head: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._make_room()
        self.open[self] = None
        self._await_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._head_came()
        elif self._head is None:
            self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self.open.pop(self, None)
        self._head_came()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        if self in self.open:  # idle from now on, and the newest of those
            self.open[self] = self.open.pop(self)
        super().on_response_complete()

    def _make_room(self) -> None:
        """Close the connection that has been idle longest, where there are too many: it would hold up others."""
        if len(self.open) < self.most:
            return
        for other in self.open:
            if other.cycle is None or other.cycle.response_complete:
                other.open.pop(other)
                other.timeout_keep_alive_handler()
                return
        if len(self.open) >= 2 * self.most:  # all of them busy: there is an end to answering that
            self.transport.abort()

    def _await_head(self) -> None:
        self._head = self.loop.call_later(self.head_seconds, self.timeout_keep_alive_handler)

    def _head_came(self) -> None:
        if self._head is not None:
            self._head.cancel()
            self._head = None


class _Bounded:
    """An application that takes so many requests at once, and says in any case whether it works.

    uvicorn's own limit counts idle connections too, and refuses health checks: a cluster would then restart a service
    that works.
    """

    ALWAYS = ("/health/live", "/health/ready")

    def __init__(self, app: FastAPI, most: int) -> None:
        self._app, self._most, self._now = app, most, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in self.ALWAYS:
            await self._app(scope, receive, send)
        elif self._now >= self._most:
            refused = {"error": f"{self._most} requests are being answered already: come back later"}
            await Lingering(refused, 503, {"Retry-After": "1"}, 1.0, 1 << 20)(scope, receive, send)
        else:
            self._now += 1
            try:
                await self._app(scope, receive, send)
            finally:
                self._now -= 1


def server_of(app: FastAPI, limits: Limits, **options: Any) -> uvicorn.Server:
    """A server, not started yet. SIGTERM and Ctrl-C end it once the requests that were let in are answered.

    Args:
        app: What it serves.
        limits: Of connections and times.
        **options: Of ``uvicorn.Config``: ``host``, ``port``, …
    """
    own = {"head_seconds": limits.head_seconds, "most": limits.connections, "open": {}}
    protocol = type("Protocol", (_Protocol,), own)
    config = uvicorn.Config(
        _Bounded(app, limits.connections),
        http=protocol,
        ws="none",
        server_header=False,
        timeout_graceful_shutdown=limits.drain_seconds,
        **options,
    )
    return uvicorn.Server(config)
