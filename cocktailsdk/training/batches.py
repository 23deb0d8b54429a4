"""Mini-batches of any loader: moved to a device, drawn repeatably, kept where they are few."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import TrainingError
from .randomness import seed_everything

__all__ = [
    "HeldBatches",
    "draw",
    "draw_groups",
    "epoch_length",
    "generator_states",
    "loader_length",
    "set_generator_states",
    "to_device",
]

KEEP_BYTES = 1 << 30
"""Held-out batches up to this size are kept in memory instead of being loaded again for every candidate."""


def to_device(batch: Any, device: torch.device) -> Any:
    """A batch with all its tensors on a device.

    Args:
        batch: A tensor, anything with a ``.to`` method, or tuples, lists and mappings of such; all else is left as
            it is.
        device: Where to.
    """
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, str | bytes):
        return batch
    if callable(getattr(batch, "to", None)):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {k: to_device(v, device) for k, v in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(to_device(v, device) for v in batch))
    if isinstance(batch, tuple | list):
        return type(batch)(to_device(v, device) for v in batch)
    return batch


def nbytes(batch: Any) -> int:
    """Bytes of all tensors in a batch."""
    if isinstance(batch, Tensor):
        return batch.numel() * batch.element_size()
    if isinstance(batch, Mapping):
        return sum(map(nbytes, batch.values()))
    if isinstance(batch, tuple | list):
        return sum(map(nbytes, batch))
    return int(getattr(batch, "nbytes", 0))


def epoch_length(loader: Iterable[Any], steps: int | None) -> int:
    """Mini-batches of an epoch: as given, as the loader says, or else counted by going through it once.

    Raises:
        TrainingError: For an empty loader, and for an iterator, which can be gone through only once.
    """
    if isinstance(loader, Iterator):
        raise TrainingError(
            f"train_loader must be iterable again and again, but a {type(loader).__name__} is spent after one epoch; "
            "give the loader itself, not iter(loader) or a generator"
        )
    if not isinstance(loader, Iterable):
        raise TrainingError(f"train_loader must be an iterable of batches, got {type(loader).__name__}")
    if steps is None and (steps := loader_length(loader)) is None:
        states = generator_states(loader)
        steps = sum(1 for _ in loader)
        set_generator_states(loader, states)
    if steps < 1 or loader_length(loader) == 0:
        raise TrainingError(
            "train_loader has no batches: an epoch needs at least one (is batch_size with drop_last "
            "larger than the data?)"
        )
    return steps


def loader_length(loader: Iterable[Any]) -> int | None:
    """How many batches a loader says that it has; ``None`` where it cannot say."""
    try:
        return len(loader)  # type: ignore[arg-type]
    except (TypeError, NotImplementedError):
        return None


def _generators(loader: Any) -> list[torch.Generator]:
    found: dict[int, torch.Generator] = {}
    seen: set[int] = set()

    def visit(thing: Any) -> None:
        if thing is None or id(thing) in seen:
            return
        seen.add(id(thing))
        if isinstance(generator := getattr(thing, "generator", None), torch.Generator):
            found[id(generator)] = generator
        for part in ("sampler", "batch_sampler"):
            visit(getattr(thing, part, None))

    visit(loader)
    return list(found.values())


def generator_states(loader: Any) -> list[Tensor]:
    """States of the loader's own random generators (its samplers' included)."""
    return [g.get_state() for g in _generators(loader)]


def set_generator_states(loader: Any, states: list[Tensor]) -> None:
    """Put the loader's own generators where they were."""
    for generator, state in zip(_generators(loader), states, strict=True):
        generator.set_state(state)


def draw(loader: Iterable[Any], key: tuple[int | str, ...], steps: int | None = None) -> Iterator[Any]:
    """One pass over a loader, the same for the same key.

    Args:
        loader: Any iterable of batches. Its samplers' ``set_epoch`` is not called.
        key: What to seed the global generators with, before the pass and again before each batch.
        steps: Stop after so many.
    """
    seed_everything(*key, "pass")
    batches = iter(loader)
    for i in itertools.count():
        if steps is not None and i >= steps:
            return
        seed_everything(*key, i)
        try:
            batch = next(batches)
        except StopIteration:
            return
        yield batch


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
    while group := list(itertools.islice(drawn, size)):
        yield group


class HeldBatches:
    """Batches to go through many times, equal every time.

    They are kept in memory up to ``keep_bytes``; beyond that every pass loads them again, from the same seed and
    from the same state of the loader's own generators.

    Args:
        loader: Any iterable of batches.
        key: Seed of each pass.
        device: Where batches are put.
        limit: Use only the first so many batches.
        keep_bytes: What may be kept in memory.
        again: What to go through instead where batches are too large to be kept; the first pass shows whether.
    """

    def __init__(
        self,
        loader: Iterable[Any],
        key: tuple[int | str, ...],
        device: torch.device,
        limit: int | None = None,
        keep_bytes: int = KEEP_BYTES,
        again: Iterable[Any] | None = None,
    ) -> None:
        self._loader, self._key, self._device, self._limit = loader, key, device, limit
        self._again = loader if again is None else again
        self._keep_bytes = keep_bytes
        self._kept: list[Any] | None = None
        self._states = generator_states(loader)

    @property
    def kept(self) -> list[Any] | None:
        """All batches, once gone through, where they are kept."""
        return self._kept

    def __iter__(self) -> Iterator[Any]:
        if self._kept is not None:
            yield from self._kept
            return
        now = generator_states(self._loader)
        set_generator_states(self._loader, self._states)
        kept: list[Any] | None = []
        room = self._keep_bytes
        try:
            for batch in draw(self._loader, self._key, self._limit):
                batch = to_device(batch, self._device)
                if kept is not None:
                    room -= nbytes(batch)
                    kept.append(batch)
                    if room < 0:
                        kept = None
                yield batch
        finally:
            set_generator_states(self._loader, now)
        self._kept = kept
        if kept is None:
            self._loader = self._again
