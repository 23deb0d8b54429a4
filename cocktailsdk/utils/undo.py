"""Running a user's model so that nothing is left of it, in the model and in global state."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .reachable import Walk
from .snapshots import TensorSnapshot
from .writes import Writes

__all__ = ["Snapshot", "computing_threads", "forked", "unchanged"]


class Snapshot:
    """The state of models, and of all that is reachable from them.

    Args:
        *roots: Modules (or anything else).
        but: Tensors of which only the flags are restored, since something else changes their values or memory
            meanwhile: subnetworks that are switched, or statistics that are measured.
        watch: See :class:`~cocktailsdk.utils.writes.Writes`. False where operations are timed, or run in great number.
        beyond: Whether to restore also what hooks and other functions refer to, and classes.
    """

    def __init__(self, *roots: Any, but: Iterable[Tensor] = (), watch: bool = True, beyond: bool = True) -> None:
        found, excluded = Walk(roots, beyond=beyond), {id(t) for t in but}
        self._snapshots = found.snapshots
        for snapshot in self._snapshots:
            if isinstance(snapshot, TensorSnapshot) and id(snapshot.tensor) in excluded:
                snapshot.ignore_memory()
        self.writes = Writes((t for t in found.tensors if id(t) not in excluded), watch=watch)

    def restore(self) -> bool:
        """Restore everything, as often as wanted.

        Returns:
            Whether anything had changed.
        """
        changed = self.writes.undo()  # first, since it writes into the memory that the tensors had
        for snapshot in self._snapshots:
            changed |= snapshot()
        return changed


@contextmanager
def forked() -> Iterator[None]:
    """Put the global generators of torch, numpy and ``random`` back as they were, whatever happens inside."""
    cpu = torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    numpy, python = np.random.get_state(), random.getstate()
    try:
        yield
    finally:
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)
        np.random.set_state(numpy)
        random.setstate(python)


_MODES: tuple[tuple[Callable[[], Any], Callable[[Any], Any]], ...] = (
    (torch.is_grad_enabled, torch.set_grad_enabled),
    (torch.get_default_dtype, torch.set_default_dtype),
    (torch.get_num_threads, torch.set_num_threads),
    (lambda: torch.is_autocast_enabled("cpu"), lambda on: torch.set_autocast_enabled("cpu", on)),
    (lambda: torch.is_autocast_enabled("cuda"), lambda on: torch.set_autocast_enabled("cuda", on)),
    (lambda: torch.backends.cudnn.benchmark, lambda on: setattr(torch.backends.cudnn, "benchmark", on)),
    (lambda: torch.backends.cudnn.deterministic, lambda on: setattr(torch.backends.cudnn, "deterministic", on)),
)
"""What is read, and how it is set. ``torch.set_num_threads`` has a cost, so only what changed is set."""


@contextmanager
def _settings_restored() -> Iterator[None]:
    """:func:`forked`, and the same for PyTorch's global modes."""
    before = [read() for read, _ in _MODES]
    with forked():
        try:
            yield
        finally:
            for (read, write), value in zip(_MODES, before, strict=True):
                if read() != value:
                    write(value)


@contextmanager
def unchanged(*roots: Any, but: Iterable[Tensor] = (), watch: bool = True, beyond: bool = True) -> Iterator[Snapshot]:
    """Inside, models may be run, traced and fail; afterwards they are what they were, attribute for attribute.

    A forward pass may do anything: keep anchors, masks and attention maps in attributes, register buffers, count,
    append to logs, fill a cache beside the model. Under ``torch.export`` all these would be stand-ins without values,
    with which the model could not run any more.

    What is restored: attributes of modules and of the objects that they hold; lists, dictionaries, sets and deques;
    tensors' identity, values, memory and flags; closures, default arguments, globals and class attributes that the
    model's code names; ``functools`` caches that gained tensors (they are emptied); random generators and PyTorch's
    global modes.

    Args:
        *roots: The models.
        but: See :class:`Snapshot`.
        watch: Likewise.
        beyond: Likewise.

    Yields:
        The snapshot, to restore in between.
    """
    before = Snapshot(*roots, but=but, watch=watch, beyond=beyond)
    with _settings_restored():
        try:
            with before.writes:
                yield before
        finally:
            before.restore()


@contextmanager
def computing_threads(wanted: int | None) -> Iterator[None]:
    """Compute with so many threads for a while; with as many as before if ``None``."""
    before = torch.get_num_threads()
    try:
        if wanted is not None:
            torch.set_num_threads(wanted)
        yield
    finally:
        torch.set_num_threads(before)
