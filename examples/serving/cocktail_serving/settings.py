"""What a service is asked to hold, and what it lets in."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Limits"]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What is refused.

    Attributes:
        body_bytes: Bytes of a request's body.
        batch: Examples in a request.
        queue: Requests that wait; one more is told to come back later.
        connections: Open connections, and requests at once. For one more the connection that has been idle longest
            is closed; where none is idle, requests are told to come back later, except those for the process's health.
        head_seconds: How long a client may take to send a request's head.
        body_seconds: How long it may take to send the body.
        answer_seconds: How long a request may wait and run.
        drain_seconds: How long requests that were let in may take to end when the service is told to stop.
    """

    body_bytes: int = 4 << 20
    batch: int = 64
    queue: int = 64
    connections: int = 512
    head_seconds: float = 10.0
    body_seconds: float = 10.0
    answer_seconds: float = 10.0
    drain_seconds: int = 20

    def __post_init__(self) -> None:
        """Refuse what is no limit."""
        wrong = [f"{name}={value}" for name, value in vars(self).items() if not value > 0]
        if wrong:
            raise ValueError(f"limits are numbers above 0, not {', '.join(wrong)}")
