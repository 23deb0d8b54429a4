"""How much each channel unit matters: the channel score (paper, Section 3.2), over weights and masks made before."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float64
from torch import Tensor

from ..errors import PatternError
from ..graph import Producer
from .base import UMG
from .magnitudes import Terms, row_sums
from .registry import pattern_class

__all__ = ["checked_beta", "terms_of", "unit_scores", "whole_sums"]


def whole_sums(umg: UMG, producer: Producer, terms: Terms) -> Float64[Tensor, " rows"]:
    """The sum of each of a producer's rows, where its values are whole."""
    return row_sums(producer.weight, umg.ranked[producer.weight], producer.axis, terms)


def unit_scores(
    umg: UMG, beta: float, sums: Callable[[UMG, Producer, Terms], Float64[Tensor, " rows"]] = whole_sums
) -> Float64[Tensor, " units"]:
    """Importance of every channel unit (paper, Section 3.2, with units in place of channels).

    A row C of a producer has the score β‖m_u⊙C‖₁ + (1-β)‖m_nm⊙C‖₁ on unmasked weights, divided by the mean over
    the producer's rows, so that no layer dominates a residual stream. A unit's score is the sum over its producers.

    Where several patterns of one term (``Pattern.term``) made masks this round, unstructured and block, say, the term
    is their mean. A term without a mask is dropped; where no mask enters, and for producers that are not eligible, the
    unmasked rows stand in. Where a score of elements was chosen, its values stand in place of the weights. A score that
    scores units by itself is returned as it is.

    Args:
        umg: ``made`` may hold masks of patterns with a term.
        beta: Weight of the unstructured term, in [0, 1].
        sums: How a producer's rows are summed.

    Returns:
        On the CPU.

    Raises:
        PatternError: A producer's weights are NaN.
    """
    if umg.unit_scores is not None:
        return umg.unit_scores
    scores = torch.zeros(umg.coupling.n_units, dtype=torch.float64)
    terms = terms_of(umg, beta)
    for producer in umg.coupling.producers:
        has_unit = producer.units >= 0
        if not bool(has_unit.any()):
            continue
        norms = sums(umg, producer, terms)
        mean = float(norms.mean())
        if mean > 0.0:
            scores.index_add_(0, producer.units[has_unit], norms[has_unit] / mean)
    return scores


def terms_of(umg: UMG, beta: float) -> Terms:
    """What magnitudes are weighed by: the share of each mask made this round that enters the score, and its elements.

    One share of 1 without elements where no mask enters.
    """
    out: list[tuple[float, Mapping[str, Tensor]]] = []
    for term, share in (("unstructured", beta), ("n:m", 1.0 - beta)):
        of = [mask.elements for name, mask in umg.made.items() if pattern_class(name).term == term]
        out += [(share / len(of), elements) for elements in of]
    return out or [(1.0, {})]


def checked_beta(pattern: str, beta: object) -> float:
    """A number in [0, 1].

    Raises:
        PatternError: It is none.
    """
    if isinstance(beta, bool) or not isinstance(beta, int | float) or not 0.0 <= beta <= 1.0:
        raise PatternError(f"{pattern}: beta must be a number in [0, 1], not {beta!r}")
    return float(beta)
