"""Merging the rounds' weights into one set (paper, section 3.3): which share of each is best, searched exactly."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from .metrics import Score

__all__ = ["ALPHAS", "Choice", "choose_alpha", "interpolate"]

ALPHAS = (1.0, 0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.05)
"""Shares of the merged weights that are tried, from the largest down; 1 rejects a round's weights."""


@dataclass(frozen=True)
class Choice:
    """What a search found.

    Attributes:
        alpha: The chosen share.
        value: Mean metric over the networks at that share.
        scores: By network, its metric at that share.
    """

    alpha: float
    value: Fraction
    scores: Mapping[str, Fraction]


def choose_alpha(
    alphas: Sequence[float],
    networks: Sequence[str],
    judge: Callable[[float, str], Score],
    known: MutableMapping[tuple[float, str], Score] | None = None,
    judged: Callable[[float, int], None] | None = None,
) -> Choice:
    """The share with the best mean metric over networks; of equals the largest.

    The search is exhaustive but for what cannot matter: once a share's networks judged so far, and the best that
    is possible for the rest, can no longer beat the best share's mean, the rest are not judged. Sums are exact, so
    the choice is that of the full search. Networks that scored lowest at the largest share come first, since they
    decide soonest.

    Args:
        alphas: The shares, in any order.
        networks: Whose metrics are averaged.
        judge: ``judge(alpha, network)``; called for one share after the other.
        known: What was judged before, and need not be again. New results are added.
        judged: Called as ``judged(alpha, n)`` after every result, where ``n`` of all
            ``len(alphas) * len(networks)`` are settled.
    """
    known = {} if known is None else known
    order = list(networks)
    best: Choice | None = None
    for i, alpha in enumerate(sorted(set(alphas), reverse=True)):
        scores: dict[str, Fraction] = {}
        total, maximum = Fraction(0), None
        for j, name in enumerate(order):
            score = known.get((alpha, name))
            if score is None:
                score = known[alpha, name] = judge(alpha, name)
                if judged is not None:
                    judged(alpha, i * len(networks) + j + 1)
            scores[name] = score.value
            total, maximum = total + score.value, score.maximum
            left = len(order) - j - 1
            if best is None or maximum is None:
                continue
            if (total + left * maximum) / len(order) <= best.value:
                break
        else:
            value = total / len(order)
            if best is None or value > best.value:
                best = Choice(alpha, value, {name: scores[name] for name in networks})
        if i == 0:
            order.sort(key=lambda name: scores[name])
    assert best is not None
    return best


@torch.no_grad()
def interpolate(merged: Mapping[str, Tensor], other: Mapping[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """``alpha * merged + (1 - alpha) * other``, tensor by tensor.

    Args:
        merged: Parameters and buffers by name.
        other: The same names.
        alpha: At 1 the result is ``merged``, bit by bit.

    Returns:
        New tensors. Integer ones (counters, index tables) are those of ``merged``.
    """
    out = {}
    for name, value in merged.items():
        floats = value.is_floating_point() or value.is_complex()
        out[name] = torch.lerp(other[name], value, alpha) if floats else value.clone()
    return out
