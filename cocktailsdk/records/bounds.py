"""What the tensors of a bundle allow its build record to ask for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Self

__all__ = ["MOST_LABELS", "MOST_POSITIONS", "Bounds"]

MOST_POSITIONS = 1 << 24
"""Of integers that no tensor's shape depends on: token numbers, positions of rotary embeddings."""

MOST_LABELS = 1 << 16
"""A configuration makes a dictionary of labels of the integer ``num_labels``."""


@dataclass(frozen=True)
class Bounds:
    """Upper limits of a record's integers.

    Attributes:
        tensors: How many tensors the model has: no part of it is repeated more often.
        largest: The largest dimension of any tensor: no layer is wider.
    """

    tensors: int = 100_000
    largest: int = MOST_POSITIONS

    @classmethod
    def of(cls, shapes: Iterable[Sequence[int]]) -> Self:
        """The limits for a model with tensors of these shapes. Empty tensors widen nothing: they take no bytes."""
        full = [s for s in shapes if 0 not in s]
        return cls(len(full), max((d for s in full for d in s), default=0))
