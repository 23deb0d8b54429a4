"""Merging the rounds' weights into one set (paper, section 3.3): an exact search for the coefficients."""

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
    """An interpolation coefficient α that a search tried.

    Attributes:
        alpha: The coefficient.
        value: Mean metric over the networks. If the search gave up early, an upper bound.
        whole: Whether everything was judged.
    """

    alpha: float
    value: Fraction
    whole: bool


@dataclass(frozen=True)
class Choice:
    """The result of a search.

    Attributes:
        alpha: The chosen coefficient.
        value: Mean metric over the networks at this coefficient.
        scores: The score of every cell at this coefficient.
        tried: All coefficients, from the largest down.
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
    """The coefficient with the best mean metric over networks; of equal ones the largest.

    A cell is a network, or a network on a part of the held-out set. Cells are judged one at a time. Once a coefficient
    can no longer beat the best sum so far, even with the best possible scores in its other cells, these are not judged.
    Sums are exact, so the result is that of the full search. The cells that lacked most at the coefficient before come
    first, since they decide soonest.

    Args:
        alphas: The coefficients, in any order.
        cells: Whose scores are added up.
        judge: ``judge(alpha, cell)``; called for one coefficient after the other.
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
        shares: Coefficients of single layers in place of ``alpha``, by :func:`layer_of` the tensors' names.

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
