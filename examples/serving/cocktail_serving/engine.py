"""Requests one after another through the network that the controller says, behind a bounded queue."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from .controller import Controller
from .inputs import Refused
from .networks import Network

__all__ = ["Answer", "Engine", "Watcher"]

log = logging.getLogger(__name__)

TICK = 0.05
"""Seconds between two decisions."""


@dataclass(frozen=True)
class Answer:
    """What a network says.

    Attributes:
        network: Its name.
        outputs: Its outputs.
        waited: Seconds that the request waited.
        ran: Seconds that the network took.
    """

    network: str
    outputs: Float[Tensor, "batch outputs"]
    waited: float
    ran: float


@dataclass(eq=False)
class _Job:
    examples: Shaped[Tensor, "batch *example"]
    came: float
    answer: asyncio.Future[Answer] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Watcher(Protocol):
    """Is told what happens."""

    def answered(self, answer: Answer, latency: float) -> None:
        """A request was answered, so many seconds after it came."""

    def refused(self, status: int) -> None:
        """A request got an answer of another kind."""

    def switched(self, before: str, after: str) -> None:
        """Another network runs from now on."""

    def looked(self, now: float) -> None:
        """A decision was made, which may be the same."""


class Engine:
    """Runs requests, each by itself, so that its answer does not depend on what others send.

    A request sees one network from start to end. All state belongs to the event loop; only the model's own work is done
    in another thread.

    Attributes:
        controller: What decides.
        networks: By name.
        ready: Whether requests are let in.
    """

    def __init__(
        self,
        networks: Mapping[str, Network],
        controller: Controller,
        *,
        queue: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.networks = dict(networks)
        self.controller = controller
        self.ready = False
        self.watchers: list[Watcher] = []
        self._limit = queue
        self._clock = clock
        self._jobs: asyncio.Queue[_Job | None] = asyncio.Queue()
        self._examples = 0  # let in and not answered
        self._tasks: list[asyncio.Task[None]] = []
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="network")

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return self._jobs.qsize()

    @property
    def active(self) -> Network:
        """The network that the next request sees."""
        return self.networks[self.controller.active]

    @property
    def alive(self) -> bool:
        """Whether requests that are let in are answered, and decisions made."""
        return bool(self._tasks) and not any(t.done() for t in self._tasks)

    def start(self) -> None:
        """Let requests in."""
        self._tasks = [asyncio.create_task(self._work()), asyncio.create_task(self._watch())]
        self.ready = True

    async def stop(self) -> None:
        """Let no more requests in, and end when those that were are answered."""
        if not self._tasks:
            return
        self.ready = False
        work, watch = self._tasks
        self._tasks = []
        self._jobs.put_nowait(None)
        await work
        watch.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watch
        self._pool.shutdown()

    async def run(self, examples: Shaped[Tensor, "batch *example"], seconds: float) -> Answer:
        """Put a request in the queue, and wait for its answer.

        Args:
            examples: What it brings.
            seconds: How long it may take. A request that has waited longer is not run any more.

        Raises:
            Refused: The queue is full, the time is over, or the service ends.
        """
        if not self.ready:
            raise Refused(503, "the service is stopping", retry_after=1)
        now = self._clock()
        self.controller.arrived(now, len(examples))
        if self.waiting >= self._limit:
            wait = self._examples * self.active.seconds
            raise Refused(503, f"{self._limit} requests wait already: come back later", max(1, math.ceil(wait)))
        job = _Job(examples, now)
        self._jobs.put_nowait(job)
        self._examples += len(examples)
        try:
            async with asyncio.timeout(seconds):
                answer = await job.answer
        except TimeoutError:
            raise Refused(504, f"there was no answer within {seconds:g} seconds", retry_after=1) from None
        finally:
            self._examples -= len(examples)
        for w in self.watchers:
            w.answered(answer, self._clock() - now)
        return answer

    async def _work(self) -> None:
        while (job := await self._jobs.get()) is not None:
            if not job.answer.done():  # else whoever asked waits no longer
                await self._answer(job)

    async def _answer(self, job: _Job) -> None:
        network, began = self.active, self._clock()
        try:
            outputs = await asyncio.get_running_loop().run_in_executor(self._pool, network, job.examples)
            if not bool(torch.isfinite(outputs).all()):
                raise Refused(422, "the network's outputs for these values are not finite")
        except Refused as error:
            _fail(job, error)
        except Exception:
            log.exception("%s failed", network.name)
            _fail(job, Refused(500, "the network failed on these values"))
        else:
            ended = self._clock()
            self.controller.finished(
                ended, network.name, len(job.examples), latency=ended - job.came, ran=ended - began
            )
            if not job.answer.done():
                job.answer.set_result(Answer(network.name, outputs, began - job.came, ended - began))

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(TICK)
            self.look()

    def look(self) -> None:
        """Have the controller decide."""
        now, before = self._clock(), self.controller.active
        after = self.controller.decide(now, self._examples)
        if after != before:
            log.info("%s after %s", after, before)
            for w in self.watchers:
                w.switched(before, after)
        for w in self.watchers:
            w.looked(now)


def _fail(job: _Job, error: Refused) -> None:
    if not job.answer.done():
        job.answer.set_exception(error)
