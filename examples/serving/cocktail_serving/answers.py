"""Answers to requests of which a part was not read."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import Message, Receive, Scope, Send

__all__ = ["Lingering"]

QUIET = 1.0
"""Seconds without a byte after which a client is taken to have sent all that it will."""


class Lingering(JSONResponse):
    """An answer that reaches clients which are still sending.

    Closing a socket that holds unread bytes resets the connection, and a client that sends all before it reads would
    see that in place of the answer. So the answer goes out at once, and what still arrives is thrown away for a while.

    Args:
        content: The answer.
        status: Its status.
        headers: Its headers; the connection is closed after it in any case.
        seconds: How long what arrives is thrown away.
        most: How many bytes of it.
    """

    def __init__(self, content: Any, status: int, headers: dict[str, str], seconds: float, most: int) -> None:
        super().__init__(content, status, {**headers, "Connection": "close"})
        self._seconds, self._most = seconds, most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the answer, then read what is left of the request."""

        async def held(message: Message) -> None:
            await send({**message, "more_body": True} if message["type"] == "http.response.body" else message)

        await super().__call__(scope, receive, held)
        waits = any(name == b"expect" for name, _ in scope["headers"])  # such a client sends nothing after a refusal
        if not waits:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._seconds):
                    await self._discard(receive)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _discard(self, receive: Receive) -> None:
        """Read until the client has sent all, pauses, or has sent too much."""
        came = 0
        while came <= self._most:
            message = await asyncio.wait_for(receive(), QUIET)
            came += len(message.get("body", b""))
            if not message.get("more_body"):  # also where the client went away
                return
