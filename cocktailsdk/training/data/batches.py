"""Mini-batches of any loader: drawn repeatably, moved to a device, cached in memory where they fit."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader

from ...utils.nested import nbytes, to_device
from ..randomness import seed_everything
from ..step.forward import mapped
from .loader_state import generator_states, set_epoch, set_generator_states

__all__ = ["CachedBatches", "draw", "draw_groups"]

log = logging.getLogger(__name__)

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
    ) -> None:
        self._loader, self._key, self._device, self._limit = loader, key, device, limit
        self._again = loader if again is None else again
        self._cache_bytes = cache_bytes
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
            for batch in draw(self._loader, self._key, self._limit):
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
