"""Merging the rounds' weights into one set (paper, section 3.3): which share of each is best, searched exactly."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..metrics import Score

__all__ = ["Choice", "Tried", "choose_alpha", "interpolate", "lacking", "layer_of"]

Cell = TypeVar("Cell", bound=Hashable)


@dataclass(frozen=True)
class Tried:
    """A share that a search looked at.

    Attributes:
        alpha: The share.
        value: Mean metric over the networks; where it was given up, the most that it could still have been.
        whole: Whether everything was judged.
    """

    alpha: float
    value: Fraction
    whole: bool


@dataclass(frozen=True)
class Choice:
    """What a search found.

    Attributes:
        alpha: The chosen share.
        value: Mean metric over the networks at that share.
        scores: The score of every cell at that share.
        tried: All shares, from the largest down.
    """

    alpha: float
    value: Fraction
    scores: Mapping[Any, Score]
    tried: tuple[Tried, ...] = field(default=(), compare=False)


def choose_alpha(
    alphas: Sequence[float],
    cells: Sequence[Cell],
    judge: Callable[[float, Cell], Score],
    known: MutableMapping[tuple[float, Cell], Score] | None = None,
    judged: Callable[[float, int], None] | None = None,
    *,
    order: Callable[[Mapping[Cell, Score]], Sequence[Cell]] | None = None,
    networks: int | None = None,
) -> Choice:
    """The share with the best mean metric over networks; of equals the largest.

    What is judged at a time is a cell: a network, or a network on a part of the held-out set. The search is exhaustive
    but for what cannot matter: once a share's cells judged so far, and the best that is possible for the rest, can no
    longer beat the best share's sum, the rest are not judged. Sums are exact, so the choice is that of the full search.
    Cells that lacked most at the share before come first, since they decide soonest.

    Args:
        alphas: The shares, in any order.
        cells: Whose scores are added up.
        judge: ``judge(alpha, cell)``; called for one share after the other.
        known: What was judged before, and need not be again. New results are added.
        judged: Called as ``judged(alpha, n)`` after every result, where ``n`` of all
            ``len(alphas) * len(cells)`` are settled.
        order: The order in which to judge all cells, from the latest score of each; by default those that lacked most
            come first.
        networks: By how many to divide the sum; by default as many as there are cells.
    """
    known = {} if known is None else known
    queue, latest = list(cells), dict[Cell, Score]()
    best: Choice | None = None
    tried: list[Tried] = []
    count = networks or len(cells)

    for i, alpha in enumerate(sorted(set(alphas), reverse=True)):
        scores: dict[Cell, Score] = {}
        total = Fraction(0)
        # what the cells not judged yet can add at most, where that is known
        limits = [latest[cell].maximum if cell in latest else None for cell in queue]
        bounded = best is not None and None not in limits
        left = sum((limit for limit in limits if limit is not None), Fraction(0)) if bounded else Fraction(0)
        for j, cell in enumerate(queue):
            score = known.get((alpha, cell))
            if score is None:
                score = known[alpha, cell] = judge(alpha, cell)
                if judged is not None:
                    judged(alpha, i * len(cells) + j + 1)
            scores[cell] = latest[cell] = score
            total += score.value
            left -= limits[j] or 0
            if bounded and best is not None and total + left <= best.value * count:
                tried.append(Tried(alpha, (total + left) / count, j + 1 == len(cells)))
                break
        else:
            value = total / count
            tried.append(Tried(alpha, value, True))
            if best is None or value > best.value:
                best = Choice(alpha, value, {cell: scores[cell] for cell in cells})
        queue = sorted(cells, key=lambda cell: -lacking(latest[cell])) if order is None else list(order(latest))
    assert best is not None
    return replace(best, tried=tuple(tried))


def lacking(score: Score) -> float:
    """By how much a score is below what is possible, where that is known, or below 0."""
    return float((score.maximum or 0) - score.value)


@torch.no_grad()
def interpolate(
    merged: Mapping[str, Tensor], other: Mapping[str, Tensor], alpha: float, shares: Mapping[str, float] | None = None
) -> dict[str, Tensor]:
    """``alpha * merged + (1 - alpha) * other``, tensor by tensor.

    Args:
        merged: Parameters and buffers by name.
        other: The same names.
        alpha: At 1 the result is ``merged``, bit by bit.
        shares: Of some layers shares of their own, by :func:`layer_of` their tensors' names.

    Returns:
        New tensors. Integer ones (counters, index tables) are those of ``merged``.
    """
    out = {}
    for name, value in merged.items():
        share = alpha if shares is None else shares.get(layer_of(name), alpha)
        floats = value.is_floating_point() or value.is_complex()
        out[name] = torch.lerp(other[name], value, share) if floats else value.clone()
    return out


def layer_of(name: str) -> str:
    """The module that a parameter or buffer belongs to."""
    return name.rpartition(".")[0]
