"""Labels, fields and joining: which element of which tensor belongs to which channel.

A *label* is an integer that stands for one channel of one weight. A *field* is an integer tensor with as many
dimensions as the tensor it belongs to, of size 1 along every dimension it does not vary in, whose entries are labels.
Labels are joined when they can only be removed together. Label 0 means 'belongs to something that must stay'.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from .connectivity import breadth_first_edges, component_roots

MUST_STAY = 0


@dataclass(frozen=True)
class Field:
    """One family of labels on a tensor.

    Attributes:
        labels: As many dimensions as the tensor; size 1 along those it does not vary in.
        zero: Whether an element whose label is masked is exactly zero here.
    """

    labels: Int64[Tensor, "..."]
    zero: bool

    @property
    def dims(self) -> frozenset[int]:
        """The dimensions along which it varies."""
        return frozenset(d for d, n in enumerate(self.labels.shape) if n > 1)

    def with_labels(self, labels: Int64[Tensor, "..."]) -> Field:
        """The same zero bit on other labels."""
        return Field(labels, self.zero)

    def with_zero(self, zero: bool) -> Field:
        """The same labels with another zero bit."""
        return self if zero == self.zero else Field(self.labels, zero)


Fields = tuple[Field, ...]


@dataclass(frozen=True)
class Cause:
    """Why a label stays.

    Attributes:
        reason: The reason given nearest to it; empty where none was, since no weight makes what it is joined to.
        at: Name of the graph's node that gave it.
        steps: How it comes there: names of the nodes that joined, each with the label that it led to.
        family: The least label of all that are joined to it; the same for labels that stay together.
    """

    reason: str
    at: str
    steps: tuple[tuple[str, int], ...]
    family: int


class Labels:
    """Makes labels and joins them. Joining only collects pairs; classes are found once, at the end.

    Attributes:
        because: The reason recorded with whatever is made to stay, until it is changed.
        at: Name of the graph's node that is being read, recorded with what is joined or made to stay.
    """

    def __init__(self) -> None:
        self.because = ""
        self.at = ""
        self._next = 1
        self._left: list[np.ndarray] = []
        self._right: list[np.ndarray] = []
        self._joined_at: list[str] = []
        self._stay: list[tuple[np.ndarray, str, str]] = []

    @property
    def count(self) -> int:
        """How many labels there are, ``MUST_STAY`` included."""
        return self._next

    def fresh(self, n: int) -> Int64[Tensor, " n"]:
        """``n`` new labels."""
        out = torch.arange(self._next, self._next + n)
        self._next += n
        return out

    def join(self, a: Int64[Tensor, "..."], b: Int64[Tensor, "..."]) -> None:
        """Joins labels position by position, under broadcasting."""
        x, y = torch.broadcast_tensors(a, b)
        differ = x != y
        left, right = x[differ], y[differ]
        fixed = (left == MUST_STAY) | (right == MUST_STAY)
        if bool(fixed.any()):
            self.stay(torch.maximum(left[fixed], right[fixed]))
            left, right = left[~fixed], right[~fixed]
        if left.numel():
            self._left.append(left.numpy())
            self._right.append(right.numpy())
            self._joined_at.append(self.at)

    def stay(self, labels: Int64[Tensor, "..."], because: str | None = None) -> None:
        """Nothing of these labels may be removed."""
        labels = labels.unique()
        labels = labels[labels != MUST_STAY]
        if labels.numel():
            self._stay.append((labels.numpy(), because or self.because, self.at))

    def collapse(self, field: Field, dims: Iterable[int]) -> Field | None:
        """Joins along dimensions, so that the field no longer varies there.

        Returns:
            What is left of the field; ``None`` (and its labels stay) if it varies along nothing else.
        """
        labels = field.labels
        for d in dims:
            if labels.shape[d] > 1:
                first = labels.narrow(d, 0, 1)
                self.join(labels, first)
                labels = first
        if labels.numel() == 1:
            self.stay(labels)
            return None
        return field.with_labels(labels)

    def stay_all(self, fields: Iterable[Field], because: str | None = None) -> None:
        """Everything that these fields label stays whole."""
        for f in fields:
            self.stay(f.labels, because)

    def classes(self) -> tuple[Int64[Tensor, " labels"], dict[int, str]]:
        """For every label the smallest label of its class, ``MUST_STAY`` for classes that stay.

        Returns:
            The roots, and for labels that stay the first reason given for their class.
        """
        root = component_roots(self._next, *self._edges())
        reason: dict[int, str] = {}
        for labels, because, _ in self._stay:
            for r in np.unique(root[labels]):
                reason.setdefault(int(r), because)
        stays = np.zeros(self._next, dtype=bool)
        stays[list(reason)] = True
        why = {int(i): reason[int(root[i])] for i in np.flatnonzero(stays[root])}
        root = np.where(stays[root], MUST_STAY, root)
        return torch.from_numpy(root), why

    def causes(self, wanted: Sequence[int], root: Int64[Tensor, " labels"]) -> dict[int, Cause]:
        """The nearest cause of each of some labels that stay, and the joins that lead to it.

        Args:
            wanted: Labels that stay.
            root: As :meth:`classes` gives it.
        """
        n = self._next
        staying = root.numpy() == MUST_STAY
        left, right = self._edges()
        join = np.repeat(np.arange(len(self._left)), [a.size for a in self._left])
        live = staying[left] & staying[right]
        left, right, join = left[live], right[live], join[live]
        family = component_roots(n, left, right)
        # One more node, n, leads to all that was made to stay: breadth first from there finds the nearest causes.
        made_to_stay = [labels for labels, _, _ in self._stay]
        sources = _concatenated(made_to_stay)
        event = np.repeat(np.arange(len(made_to_stay)), [a.size for a in made_to_stay])
        tail = np.concatenate([left, right, np.full(sources.size, n)])
        head = np.concatenate([right, left, sources])
        # Of edges between the same two labels, the one that was recorded first counts.
        _, first = np.unique(tail * (n + 1) + head, return_index=True)
        tail, head, recorded = tail[first], head[first], np.concatenate([join, join, event])[first]
        edge = breadth_first_edges(n + 1, tail, head, n)

        def cause(label: int) -> Cause:
            least = int(family[label])
            steps: list[tuple[str, int]] = []
            while (at := int(edge[label])) >= 0:
                previous = int(tail[at])
                if previous == n:
                    _, reason, node = self._stay[recorded[at]]
                    return Cause(reason, node, tuple(steps), least)
                steps.append((self._joined_at[recorded[at]], previous))
                label = previous
            return Cause("", "", (), least)

        return {label: cause(label) for label in wanted}

    def _edges(self) -> tuple[Int64[np.ndarray, " joins"], Int64[np.ndarray, " joins"]]:
        """All pairs of joined labels, in the order in which they were joined."""
        return _concatenated(self._left), _concatenated(self._right)


def _concatenated(arrays: Sequence[np.ndarray]) -> Int64[np.ndarray, " n"]:
    """One array of all, also where there are none."""
    return np.concatenate([np.zeros(0, dtype=np.int64), *arrays])


def compact(labels: Int64[Tensor, "..."]) -> Int64[Tensor, "..."]:
    """Size 1 along every dimension in which nothing changes."""
    for d in range(labels.dim()):
        if labels.shape[d] > 1:
            first = labels.narrow(d, 0, 1)
            if bool((labels == first).all()):
                labels = first
    return labels


def spread(labels: Int64[Tensor, "..."], shape: Sequence[int], dims: Iterable[int]) -> Int64[Tensor, "..."]:
    """Gives labels their full size along some dimensions of a tensor of that shape."""
    size = list(labels.shape)
    for d in dims:
        size[d] = shape[d]
    return labels.expand(size)
