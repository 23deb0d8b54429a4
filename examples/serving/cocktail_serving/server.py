"""The web server: uvicorn, with a limit on how long a request's head may take."""

from __future__ import annotations

import asyncio
from typing import Any

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from .settings import Limits

__all__ = ["server_of"]


class _Protocol(H11Protocol):
    """uvicorn waits for a request's head for as long as a client likes; this does not."""

    head_seconds: float
    _head: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._head_came()
        elif self._head is None:
            self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_came()
        super().connection_lost(exc)

    def _await_head(self) -> None:
        self._head = self.loop.call_later(self.head_seconds, self.timeout_keep_alive_handler)

    def _head_came(self) -> None:
        if self._head is not None:
            self._head.cancel()
            self._head = None


def server_of(app: FastAPI, limits: Limits, **options: Any) -> uvicorn.Server:
    """A server, not started yet. SIGTERM and Ctrl-C end it once the requests that were let in are answered.

    Args:
        app: What it serves.
        limits: Of connections and times.
        **options: Of ``uvicorn.Config``: ``host``, ``port``, …
    """
    protocol = type("Protocol", (_Protocol,), {"head_seconds": limits.head_seconds})
    config = uvicorn.Config(
        app,
        http=protocol,
        ws="none",
        server_header=False,
        limit_concurrency=limits.connections,
        timeout_graceful_shutdown=limits.drain_seconds,
        **options,
    )
    return uvicorn.Server(config)
