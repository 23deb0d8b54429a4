"""Running a user's model so that nothing is left of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .held import HeldTensor
from .reachable import Walk
from .settings import settings_kept
from .writes import Writes

__all__ = ["Snapshot", "unchanged"]


class Snapshot:
    """What models, and all that is reachable from them, held at one moment.

    Args:
        *roots: Modules (or anything else).
        tensors: Whether to restore tensors, too. Not where their values or memory are meant to change meanwhile: where
            subnetworks are switched, or statistics measured.
    """

    def __init__(self, *roots: Any, tensors: bool = True) -> None:
        found = Walk(roots)
        self._held = [held for held in found.held if tensors or not isinstance(held, HeldTensor)]
        self.writes = Writes(found.tensors if tensors else ())

    def restore(self) -> None:
        """Put everything back. It can be done again and again."""
        self.writes.undo()  # first: into the memory that tensors had
        for held in self._held:
            held()


@contextmanager
def unchanged(*roots: Any, tensors: bool = True) -> Iterator[Snapshot]:
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
        tensors: See :class:`Snapshot`.

    Yields:
        The snapshot, to restore in between.
    """
    before = Snapshot(*roots, tensors=tensors)
    with settings_kept():
        try:
            with before.writes:
                yield before
        finally:
            before.restore()
