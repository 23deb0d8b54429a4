"""Recipes with ``same_batch``: which steps are on one batch, and which dense output teaches them."""

from __future__ import annotations

from typing import Any

from torch.utils._pytree import tree_leaves

from ...utils.nested import tensors_in
from ..recipes.steps import Step

__all__ = ["BatchIdentity", "SameBatch"]


class SameBatch:
    """Whether the next step is on the batch of the step before, whose dense output then is its teacher.

    Args:
        enabled: Whether the recipe allows it.

    Attributes:
        teacher: The dense network's output for the batch of the step before, while the next step may follow it.
    """

    def __init__(self, enabled: bool) -> None:
        self._enabled, self._leads = enabled, False
        self.teacher: Any = None
        self._batch: BatchIdentity | None = None

    @property
    def open(self) -> bool:
        """Whether the next step may follow: between two steps on one batch a run cannot be saved."""
        return self._leads

    def follows(self, step: Step) -> bool:
        """Whether the next step is on the batch of the step before."""
        return self._leads and step.follows

    def leads(self, step: Step, *, last: bool = False) -> bool:
        """Whether a step's dense output may be needed after it.

        Args:
            step: Any.
            last: Whether the next step needs another batch in any case: an epoch ends here.
        """
        return self._enabled and step.leads and not last

    def done(self, step: Step, teacher: Any, *, last: bool = False, batch: Any = None) -> None:
        """Note that a step was made.

        Args:
            step: The step.
            teacher: The dense network's output for its batch.
            last: As of :meth:`leads`.
            batch: The batch, where the next step may come with another one.
        """
        self._leads = self.leads(step, last=last)
        self.teacher = teacher if self._leads else None
        self._batch = BatchIdentity(batch) if self._leads and batch is not None else None

    def teacher_of(self, step: Step, batch: Any) -> Any:
        """The dense network's output, if the next step follows on the very batch of the step before."""
        same = self.follows(step) and self._batch is not None and self._batch.same(batch)
        return self.teacher if same else None

    def clear(self) -> None:
        """Let the next step take another batch."""
        self._leads, self.teacher, self._batch = False, None, None


class BatchIdentity:
    """A batch as it is now, to see later whether another one is the very same.

    A loader may write the next batch into the same memory, so that the same objects alone do not suffice: torch counts
    in ``Tensor._version`` how often a tensor was written to.
    """

    def __init__(self, batch: Any) -> None:
        self._leaves, self._versions = tree_leaves(batch), _versions(batch)

    def same(self, batch: Any) -> bool:
        """Whether a batch holds the same objects, not written to since."""
        leaves = tree_leaves(batch)
        alike = len(leaves) == len(self._leaves) and all(a is b for a, b in zip(leaves, self._leaves, strict=True))
        return alike and _versions(batch) == self._versions


def _versions(batch: Any) -> list[int]:
    try:
        return [tensor._version for tensor in tensors_in(batch)]
    except RuntimeError:  # inference tensors are not counted, and cannot be written to outside of inference mode
        return []
