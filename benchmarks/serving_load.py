"""A load generator: requests sent when they are due, whether or not earlier ones were answered."""

from __future__ import annotations

import asyncio
import io
import math
import random
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np

__all__ = ["Batch", "Sent", "capacity", "offer", "schedule", "windows"]

MOST_REQUESTS, MOST_SECONDS, MOST_RATE = 60_000, 900.0, 2_000.0
"""Nobody is flooded by mistake."""

HEADERS = {"Content-Type": "application/x-npy"}
PATIENCE = httpx.Timeout(15.0)


@dataclass(frozen=True)
class Batch:
    """What a request carries.

    Attributes:
        body: The bytes.
        labels: What a perfect network would answer.
    """

    body: bytes
    labels: tuple[int, ...]

    @classmethod
    def of(cls, images: Any, labels: Any) -> Batch:
        """An array and its labels."""
        file = io.BytesIO()
        np.save(file, np.asarray(images))
        return cls(file.getvalue(), tuple(int(k) for k in labels))


@dataclass(frozen=True)
class Sent:
    """What became of a request.

    Attributes:
        due: When it was to be sent, in seconds from the first.
        latency: Seconds from then to its answer, be that what it may.
        status: HTTP status; 0 where there was none.
        network: The network that answered.
        right: How many of its examples were classified rightly.
        examples: How many it carried.
    """

    due: float
    latency: float
    status: int
    network: str = ""
    right: int = 0
    examples: int = 0


def schedule(steps: Iterable[tuple[float, float]], seed: int = 0) -> list[float]:
    """When requests are due, in seconds: at random, independently of each other (a Poisson process).

    Args:
        steps: Rates in requests a second, and for how many seconds.
        seed: The same gives the same times.

    Raises:
        ValueError: That would be more, for longer or faster than this generator sends.
    """
    draw, out, begins = random.Random(seed), [], 0.0
    for rate, seconds in steps:
        if not 0 < rate <= MOST_RATE or not seconds > 0:
            raise ValueError(f"{rate} requests a second for {seconds} s: at most {MOST_RATE} are sent")
        at = begins + draw.expovariate(rate)
        begins += seconds
        while at < begins:
            out.append(at)
            at += draw.expovariate(rate)
    if len(out) > MOST_REQUESTS or begins > MOST_SECONDS:
        raise ValueError(f"{len(out)} requests in {begins} s are more than {MOST_REQUESTS} in {MOST_SECONDS} s")
    return out


async def offer(url: str, due: Sequence[float], batches: Sequence[Batch]) -> list[Sent]:
    """Send requests when they are due, and wait for all answers."""
    limits = httpx.Limits(max_connections=400, max_keepalive_connections=400)
    async with (
        httpx.AsyncClient(timeout=PATIENCE, limits=limits, trust_env=False) as client,
        asyncio.TaskGroup() as group,
    ):
        began = time.perf_counter() + 0.2
        tasks = []
        for i, at in enumerate(due):
            await asyncio.sleep(max(0.0, began + at - time.perf_counter()))
            tasks.append(group.create_task(_send(client, url, batches[i % len(batches)], began, at)))
    return [task.result() for task in tasks]


async def _send(client: httpx.AsyncClient, url: str, batch: Batch, began: float, due: float) -> Sent:
    try:
        answer = await client.post(url, content=batch.body, headers=HEADERS)
    except httpx.HTTPError:
        return Sent(due, time.perf_counter() - began - due, 0, examples=len(batch.labels))
    latency = time.perf_counter() - began - due
    if answer.status_code != 200:
        return Sent(due, latency, answer.status_code, examples=len(batch.labels))
    told = answer.json()
    right = sum(k == label for k, label in zip(told["classes"], batch.labels, strict=True))
    return Sent(due, latency, 200, told["network"], right, len(batch.labels))


async def capacity(url: str, batches: Sequence[Batch], seconds: float, clients: int) -> tuple[float, float]:
    """What a service holds: each client sends its next request when the last was answered.

    Returns:
        Requests a second, and the median latency in seconds.

    Raises:
        RuntimeError: A request failed.
    """
    latencies: list[float] = []
    async with httpx.AsyncClient(timeout=PATIENCE, trust_env=False) as client:
        ends = time.perf_counter() + min(seconds, MOST_SECONDS)

        async def one(first: int) -> None:
            for i in range(first, MOST_REQUESTS, clients):
                if time.perf_counter() >= ends:
                    return
                sent = await _send(client, url, batches[i % len(batches)], time.perf_counter(), 0.0)
                if sent.status != 200:
                    raise RuntimeError(f"a request got {sent.status} while measuring what the service holds")
                latencies.append(sent.latency)

        async with asyncio.TaskGroup() as group:
            for k in range(clients):
                group.create_task(one(k))
    return len(latencies) / seconds, sorted(latencies)[len(latencies) // 2]


def windows(sent: Sequence[Sent], seconds: float, goal: float, share: float = 0.95) -> list[dict[str, Any]]:
    """What happened, by the time at which requests were due.

    The goal is kept in a window if this share of its requests was answered within so many seconds of when they were
    due; a request that failed was not.
    """
    out = []
    for k in range(math.ceil(max((s.due for s in sent), default=0.0) / seconds)):
        mine = [s for s in sent if k * seconds <= s.due < (k + 1) * seconds]
        answered = [s for s in mine if s.status == 200]
        if not mine:
            continue
        within = sum(s.latency <= goal for s in answered)
        ordered = sorted(s.latency if s.status == 200 else math.inf for s in mine)
        p95 = ordered[math.ceil(share * len(mine)) - 1]
        out.append(
            {
                "at": round(k * seconds, 3),
                "requests": len(mine),
                "failed": len(mine) - len(answered),
                "within": within,
                "kept": within >= share * len(mine),
                "p95_ms": round(1e3 * p95, 2) if math.isfinite(p95) else None,
                "right": sum(s.right for s in answered),
                "examples": sum(s.examples for s in answered),
                "networks": {n: sum(s.network == n for s in answered) for n in sorted({s.network for s in answered})},
            }
        )
    return out
