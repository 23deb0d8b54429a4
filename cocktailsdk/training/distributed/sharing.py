"""Mini-batches shared out among processes, so that together they hold what one process would have seen.

A loader's batch is the batch of all processes. Each computes a share of its examples, and what a share weighs in a mean
goes with it, so that means are those over all examples however unevenly they divide.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

from ...errors import TrainingError
from ...utils.nested import nbytes, to_device
from ..data.loader_state import attribute
from ..randomness import seed_everything
from .ranks import Ranks

__all__ = ["Part", "examples", "held_out_loader", "inputs_of", "part_of", "shards_itself", "shared_loader"]


@dataclass(frozen=True)
class Part:
    """A process's share of a batch.

    Attributes:
        batch: The examples; where there is none for this process, one that does not count.
        count: How many of them count.
        rows: Which of the whole batch's examples they are; empty where none counts.
        total: How many examples the whole batch has; 0 where that is not known here.
    """

    batch: Any
    count: int
    rows: range
    total: int

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return nbytes(self.batch)

    def to(self, device: torch.device) -> Part:
        """The same with its batch on a device."""
        return replace(self, batch=to_device(self.batch, device))


def examples(batch: Any) -> int:
    """How many examples a batch holds: the length of its tensors' first axis; 1 where it has no tensor with an axis."""
    if isinstance(batch, Part):
        return batch.count
    leaves = tree_flatten(_plain(batch))[0]
    return next((len(leaf) for leaf in leaves if isinstance(leaf, Tensor | np.ndarray) and leaf.ndim), 1)


def inputs_of(batch: Any) -> Any:
    """What the model is run on: the examples of a part, or the batch as it is."""
    return batch.batch if isinstance(batch, Part) else batch


def part_of(batch: Any, ranks: Ranks) -> Part:
    """This process's share of a batch.

    Args:
        batch: A tree of tensors, the first axis of each over examples. Numbers and tensors without an axis go to all.
        ranks: The processes.

    Raises:
        TrainingError: The batch cannot be split; says what to do.
    """
    if isinstance(batch, Part):
        return batch
    leaves, tree = tree_flatten(_plain(batch))
    cpu = torch.device("cpu")
    leaves = [to_device(leaf, cpu) if isinstance(leaf, np.ndarray) else leaf for leaf in leaves]
    sizes = {len(leaf) for leaf in leaves if isinstance(leaf, Tensor) and leaf.ndim}
    other = {type(leaf).__name__ for leaf in leaves if not isinstance(leaf, Tensor | int | float | None)}
    if len(sizes) != 1 or other:
        found = f"tensors whose first axes have {sorted(sizes)} elements" if not other else f"a {min(other)}"
        raise TrainingError(
            f"a batch with {found} cannot be shared out among {ranks.world} processes by its examples: give a torch "
            "DataLoader with a map-style dataset, whose examples are shared out before they are loaded, or loaders "
            "that give each process a part of its own, and batches=BatchSettings(shard_loader=False)"
        )
    total = sizes.pop()
    rows = ranks.rows(total)
    taken = slice(rows.start, rows.stop) if rows else slice(0, 1)
    mine = [leaf[taken] if isinstance(leaf, Tensor) and leaf.ndim else leaf for leaf in leaves]
    return Part(tree_unflatten(mine, tree), len(rows), rows, total)


def shards_itself(loader: Any) -> bool:
    """Whether a loader is seen to give every process a part of its own."""
    samplers = (attribute(loader, "sampler"), attribute(attribute(loader, "batch_sampler"), "sampler"))
    prepared = type(loader).__module__.startswith("accelerate.")
    return prepared or any(isinstance(s, DistributedSampler) for s in samplers)


def shared_loader(loader: Iterable[Any], ranks: Ranks, shard: bool | None = None) -> Iterable[Any]:
    """A loader's batches, of each this process's :class:`Part`; the loader itself where there is one process.

    A ``DataLoader`` over a map-style dataset loads this process's examples alone, with the loader's own workers,
    samplers and collation. Other loaders are gone through as a whole in each process.

    Args:
        loader: The same in every process.
        ranks: The processes.
        shard: ``False`` where the loader gives each process a part of its own; ``None``: unless that is seen on it.
    """
    if ranks.world == 1:
        return loader
    if shard is False or (shard is None and shards_itself(loader)):
        return _Parts(loader)
    plain = type(loader) is DataLoader and not isinstance(loader.dataset, IterableDataset)
    if plain and attribute(loader, "batch_sampler") is not None:
        return _Loading(loader, ranks)  # type: ignore[arg-type]
    return _Parts(loader, ranks)


def held_out_loader(loader: Iterable[Any], ranks: Ranks) -> Iterable[Any]:
    """Held-out batches, of each this process's part; to go through again where they are too large to be kept.

    Raises:
        TrainingError: Of several processes each would get a part that the loader chose, with examples twice or left
            out, as such loaders pad their parts to equal length.
    """
    if ranks.world > 1 and shards_itself(loader):
        raise TrainingError(
            f"held-out data come from a loader that gives each process its own part ({type(loader).__name__} with "
            f"{type(getattr(loader, 'sampler', None)).__name__}), padded to equal length: give a plain loader, the "
            "same in every process, whose batches are shared out here so that every example counts once"
        )
    return shared_loader(loader, ranks)


class _Wrapped:
    """A loader around another, whose samplers and generators are found as the other's."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader
        for name in ("sampler", "batch_sampler", "generator", "dataset", "set_epoch"):
            if (own := attribute(loader, name)) is not None:
                setattr(self, name, own)

    def __len__(self) -> int:
        return len(self._loader)


class _Parts(_Wrapped):
    """A loader's batches, or this process's examples of each where they are the same in every process."""

    def __init__(self, loader: Any, ranks: Ranks | None = None) -> None:
        super().__init__(loader)
        self._ranks = ranks

    def __iter__(self) -> Iterator[Part]:
        for batch in self._loader:
            if self._ranks is not None:
                yield part_of(batch, self._ranks)
            else:
                count = examples(batch)
                yield Part(batch, count, range(count), 0)


class _Loading(_Wrapped):
    """A ``DataLoader`` of which each process loads its examples alone."""

    def __init__(self, loader: DataLoader[Any], ranks: Ranks) -> None:
        super().__init__(loader)
        self._ranks = ranks
        self._indices = _Indices(loader, ranks)
        self._generator = torch.Generator()
        self._mine: DataLoader[Any] = DataLoader(
            loader.dataset,
            batch_sampler=self._indices,
            num_workers=loader.num_workers,
            collate_fn=loader.collate_fn,
            pin_memory=loader.pin_memory,
            timeout=loader.timeout,
            worker_init_fn=loader.worker_init_fn,
            multiprocessing_context=loader.multiprocessing_context,
            generator=self._generator,
            prefetch_factor=loader.prefetch_factor,
            persistent_workers=loader.persistent_workers,
        )

    def __iter__(self) -> Iterator[Part]:
        # what the loader itself would have drawn for its workers, so that the order is the same as without sharing
        base = int(torch.empty((), dtype=torch.int64).random_(generator=self._loader.generator))
        self._generator.manual_seed((base + self._ranks.rank) & 0x7FFFFFFFFFFFFFFF)
        self._indices.drawn.clear()
        for number, batch in enumerate(self._mine):
            rows, total = self._indices.drawn.pop(number)
            yield Part(batch, len(rows), rows, total)


class _Indices:
    """A batch sampler's batches, of each this process's part."""

    def __init__(self, loader: DataLoader[Any], ranks: Ranks) -> None:
        self._batches: Any = loader.batch_sampler
        self._here = loader.num_workers == 0
        self._ranks = ranks
        self.drawn: dict[int, tuple[range, int]] = {}

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[list[Any]]:
        for number, batch in enumerate(self._batches):
            indices = list(batch)
            rows = self._ranks.rows(len(indices))
            self.drawn[number] = (rows, len(indices))
            if self._here and self._ranks.rank:
                # the order is drawn; what examples draw must not be the same in every process
                seed_everything(torch.initial_seed(), "rank", self._ranks.rank)
            yield [indices[i] for i in rows] or indices[:1]


def _plain(batch: Any) -> Any:
    """Mappings that are not known as trees (transformers' ``BatchEncoding``) as dicts."""
    return dict(batch) if not isinstance(batch, dict) and hasattr(batch, "keys") else batch
