"""Mini-batches of any loader: drawn repeatably, moved to a device, cached in memory where they fit.

The training loader is one long stream: a pass over it goes on in the next epoch, wherever epochs and rounds end.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader

from ...errors import TrainingError
from ...utils.nested import nbytes, to_device
from ..randomness import seed_everything
from ..step.forward import mapped
from .loader_state import generator_states, set_epoch, set_generator_states

__all__ = ["CachedBatches", "Stream", "draw", "draw_groups"]

log = logging.getLogger(__name__)

Place = tuple[int, int, int]
"""Where in a run something is: its round, epoch, and step of the epoch."""
Guard = Callable[[Iterable[Any]], Iterator[Any]]

CACHE_BYTES = 1 << 30
"""Held-out batches up to this size are cached in memory instead of being loaded again for every candidate."""


def draw(loader: Iterable[Any], key: tuple[int | str, ...], steps: int | None = None) -> Iterator[Any]:
    """One pass over a loader, the same for the same key.

    Args:
        loader: Any iterable of batches. Its samplers' ``set_epoch`` is not called.
        key: What to seed the global generators with, before the pass and again before each batch.
        steps: Stop after so many.
    """
    seed_everything(*key, "pass")
    batches = iter(loader)
    try:
        for i in itertools.count():
            if steps is not None and i >= steps:
                return
            seed_everything(*key, i)
            try:
                batch = next(batches)
            except StopIteration:
                return
            yield batch
    finally:
        _close(batches)


def _close(batches: Iterator[Any]) -> None:
    """Close a loader's generator; what it raises then comes after its last batch, and loses none."""
    if isinstance(batches, Generator):
        try:
            batches.close()
        except Exception as error:
            log.warning("a loader raised %s (%s) when it was closed", type(error).__name__, error)


def draw_groups(
    loader: Iterable[Any], key: tuple[int | str, ...], batches: int | None, size: int
) -> Iterator[list[Any]]:
    """One pass over a loader, several batches at a time; the last group of a pass may be smaller.

    Args:
        loader: As in :func:`draw`.
        key: As in :func:`draw`.
        batches: Stop after so many; ``None`` at the loader's end.
        size: Batches of a group.
    """
    drawn = draw(loader, key, batches)
    if size > 1 and _may_reuse(loader):
        drawn = map(_own, drawn)
    while group := list(itertools.islice(drawn, size)):
        yield group


def _may_reuse(loader: Any) -> bool:
    """Whether the memory of a batch may be written over with the next one, as loaders with buffers do."""
    return not isinstance(loader, DataLoader | Sequence)


def _own(batch: Any) -> Any:
    return mapped(batch, torch.Tensor.clone)


class CachedBatches:
    """Batches to go through many times, equal every time.

    They are cached in memory up to ``cache_bytes``; beyond that every pass loads them again, from the same seed, the
    same epoch (``set_epoch``) and the same state of the loader's own generators.

    Args:
        loader: Any iterable of batches.
        key: Seed of each pass.
        device: Where batches are put.
        limit: Use only the first so many batches.
        cache_bytes: How much memory the cache may take.
        again: What to go through instead where batches are too large to be cached; the first pass shows whether.
        without: Which batches to leave out, unless that would be all of them.

    Attributes:
        cached: All batches, after the first pass; ``None`` before it and where they are too large.
    """

    def __init__(
        self,
        loader: Iterable[Any],
        key: tuple[int | str, ...],
        device: torch.device,
        limit: int | None = None,
        cache_bytes: int = CACHE_BYTES,
        again: Iterable[Any] | None = None,
        without: Callable[[Any], bool] | None = None,
    ) -> None:
        self._loader, self._key, self._device, self._limit = loader, key, device, limit
        self._again = loader if again is None else again
        self._cache_bytes, self._without = cache_bytes, without
        self.cached: list[Any] | None = None
        self._states = generator_states(loader)

    def __iter__(self) -> Iterator[Any]:
        if self.cached is not None:
            yield from self.cached
            return
        now = generator_states(self._loader)
        set_generator_states(self._loader, self._states)
        set_epoch(self._loader, 0)
        reused = _may_reuse(self._loader)
        cache: list[Any] | None = []
        bytes_left = self._cache_bytes
        try:
            for batch in self._chosen(draw(self._loader, self._key, self._limit)):
                batch = to_device(batch, self._device)
                if cache is not None and reused:
                    batch = _own(batch)
                if cache is not None:
                    bytes_left -= nbytes(batch)
                    cache.append(batch)
                    if bytes_left < 0:
                        cache = None
                yield batch
        finally:
            set_generator_states(self._loader, now)
        self.cached = cache
        if cache is None:
            self._loader = self._again

    def _chosen(self, batches: Iterator[Any]) -> Iterator[Any]:
        if self._without is None:
            yield from batches
            return
        some = False
        others: list[Any] = []
        for batch in batches:
            if not self._without(batch):
                some = True
                others.clear()
                yield batch
            elif not some:
                others.append(_own(batch))
        yield from others


class Stream:
    """Batches for one optimizer step after the other, pass after pass over a loader, repeatable from any point.

    Every batch of the loader is drawn before any is drawn again, also where an epoch has fewer steps than the loader
    has batches. A pass is seeded by the place in the run at which it began.

    Args:
        loader: As the user gave it: its generators and samplers are set.
        shared: What this process draws of it.
        seed: The run's.
        size: Batches of a step; the last step of a pass may get fewer.
        length: Batches of a pass; ``None`` where the loader cannot say.

    Attributes:
        generators: States of the loader's own generators when the pass began, or when the last one ended.
        begun: Where in the run the pass began; ``None`` between two passes.
        drawn: Steps that the pass has given batches to.
        passes: How many passes have begun.
    """

    def __init__(
        self,
        loader: Iterable[Any],
        shared: Iterable[Any],
        seed: int,
        *,
        size: int,
        length: int | None,
        generators: Mapping[str, Any],
    ) -> None:
        self.generators = generators
        self.begun: Place | None = None
        self.drawn = self.passes = 0
        self._loader, self._shared, self._seed = loader, shared, seed
        self._size, self._length = size, length
        self._open: Iterator[list[Any]] | None = None

    def draw(self, place: Place, guard: Guard) -> tuple[list[Any], int]:
        """The batches of the next step, and the index of the first in its pass.

        Args:
            place: Where the run is: a pass that begins here is seeded by it.
            guard: Surrounds the pass, to stop or to say which batch failed.

        Raises:
            TrainingError: A whole pass over the loader gave no batch.
        """
        for _ in range(2):  # a loader without a length may turn out to be at its end
            if self.begun is None:
                self._begin(place)
            if self._open is None:
                self._open = self._drawing(guard)
            if (group := next(self._open, None)) is not None:
                first = self.drawn * self._size
                self.drawn += 1
                if self._length is not None and self.drawn * self._size >= self._length:
                    self._end()
                return group, first
            self._end()
        raise TrainingError("train_loader gave no batches in a whole pass: it must be iterable again and again")

    def close(self) -> None:
        """Let go of the loader, so that others can iterate over it; the pass is found again by drawing it anew."""
        if self._open is not None:
            self._open.close()  # type: ignore[attr-defined]
            self._open = None

    def state_dict(self) -> dict[str, Any]:
        """Where the stream is, without the generators' states."""
        return {"begun": None if self.begun is None else list(self.begun), "drawn": self.drawn, "passes": self.passes}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Be where another stream was."""
        self.close()
        self.begun = None if state["begun"] is None else tuple(state["begun"])
        self.drawn, self.passes = state["drawn"], state["passes"]

    def _begin(self, place: Place) -> None:
        self.begun, self.drawn = place, 0
        self.passes += 1

    def _end(self) -> None:
        self.close()
        self.generators = generator_states(self._loader)
        self.begun, self.drawn = None, 0

    def _drawing(self, guard: Guard) -> Iterator[list[Any]]:
        """The pass that has begun, from where it was left."""
        assert self.begun is not None
        round_, epoch, step = self.begun
        set_generator_states(self._loader, self.generators)
        set_epoch(self._loader, self.passes - 1)
        key: tuple[int | str, ...] = (self._seed, "epoch", round_, epoch)
        if step:  # not the epoch's first pass
            key = (*key, "from step", step)
        groups = guard(draw_groups(self._shared, key, self._length, self._size))
        for _ in range(self.drawn):
            if next(groups, None) is None:
                break
        return groups
