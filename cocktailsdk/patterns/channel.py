"""Channel sparsity: whole units of coupled channels, the same share of every group."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float64
from torch import Tensor

from ..errors import PatternError
from ..graph import Coupling, Group, Producer
from ..masks import Mask
from .base import UMG, Pattern, Subnet, checked_sparsities
from .checking import check_units
from .magnitudes import Terms, row_sums
from .registry import pattern_class, register_pattern

AUTO_MULTIPLE = 8  # what GPUs' matrix units want
AUTO_CHANNELS = 256  # groups at least this wide


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


def kept_units(group: Group, sparsity: float, round_to: int | str = 1) -> int:
    """How many of a group's n units stay: ``n - round(sparsity * n)``, at least one.

    Args:
        group: The group.
        sparsity: In [0, 1].
        round_to: The number of channels kept is rounded to a multiple of this (at least one multiple, at most all);
            ``"auto"`` means 8 in groups of 256 channels and more, 1 elsewhere.
    """
    return rounded_units(group, group.size - min(round(sparsity * group.size), group.size - 1), round_to)


def rounded_units(group: Group, kept: int, round_to: int | str = 1) -> int:
    """A number of units kept, rounded so that their channels are a multiple of ``round_to``; all stay all."""
    step = rounding_step(group, round_to)
    if kept == group.size or step == 1:
        return kept
    return min(group.size, max(1, round(kept / step)) * step)


def rounding_step(group: Group, round_to: int | str = 1) -> int:
    """How many units have a multiple of ``round_to`` channels."""
    if round_to == "auto":
        round_to = AUTO_MULTIPLE if group.size * group.channels >= AUTO_CHANNELS else 1
    return int(round_to) // math.gcd(int(round_to), group.channels)


def removed_units(
    scores: Float64[Tensor, " units"],
    coupling: Coupling,
    sparsity: float,
    previous: Bool[Tensor, " units"] | None = None,
    round_to: int | str = 1,
    groups: Iterable[Group] | None = None,
) -> Bool[Tensor, " units"]:
    """The units of least score of each group (of these groups alone, where given); those removed before go first.

    Ties by position.
    """
    removed = torch.zeros(coupling.n_units, dtype=torch.bool)
    for g in coupling.groups if groups is None else groups:
        s = scores[g.start : g.stop].clone()
        gone = g.size - kept_units(g, sparsity, round_to)
        if previous is not None:
            before = previous[g.start : g.stop]
            s[before] = -math.inf
            gone = max(gone, int(before.sum()))
        removed[g.start + s.argsort(stable=True)[:gone]] = True
    return removed


@register_pattern("channel")
class Channel(Pattern):
    """Removes the same share of channel units from every group (paper, Section 3.2), nested over its levels.

    Of a group's n units exactly ``round(sparsity * n)`` go, never all. About ``1 - (1 - sparsity)²`` of the weights
    go with them.

    Args:
        sparsities: Ascending, in [0, 1]; by default ``1 - (1 - rate)^k`` for k = 1 … rounds.
        rounds: Number of default levels.
        rate: Share of the kept units that each default level removes.
        beta: Weight of the unstructured mask in the score; the N:M mask has the rest.
        round_to: Channels kept are rounded to a multiple of this; ``"auto"``: 8 in groups of 256 channels and more.

    Raises:
        PatternError: An argument makes no sense.
    """

    after = ("unstructured", "n:m")
    removes_units = True
    ranks = "units"

    def __init__(
        self,
        sparsities: Sequence[float] | None = None,
        rounds: int = 10,
        rate: float = 0.1,
        beta: float = 0.8,
        round_to: int | str | None = "auto",
    ) -> None:
        self.sparsities, self._subnets, self._levels = checked_sparsities(self.name, sparsities, rounds, rate)
        self.beta = checked_beta(self.name, beta)
        self.round_to = checked_round_to(round_to)

    def subnets(self) -> tuple[Subnet, ...]:
        """Its subnetworks, from the widest to the narrowest."""
        return self._subnets

    def mask(self, subnet: Subnet, umg: UMG) -> Mask:
        """The units of least score go."""
        previous = umg.previous.removed if umg.previous is not None else None
        scores = unit_scores(umg, self.beta)
        return Mask(removed=removed_units(scores, umg.coupling, subnet.sparsity, previous, self.round_to))

    def exact_sparsity(self, subnet: Subnet, mask: Mask, umg: UMG) -> float:
        """Removed units among all."""
        del subnet
        n = umg.coupling.n_units
        return int(mask.removed.sum()) / n if mask.removed is not None and n else 0.0

    def check(self, subnet: Subnet, mask: Mask, umg: UMG) -> None:
        """Of every group exactly as many units go as :func:`kept_units` leaves out.

        Raises:
            PatternError: Another number does, or single elements are masked.
        """
        groups = umg.coupling.groups
        check_units(subnet, mask, {g: g.size - kept_units(g, subnet.sparsity, self.round_to) for g in groups})

    def config(self) -> dict[str, Any]:
        """Keyword arguments that make an equal pattern."""
        return {**self._levels, "beta": self.beta, "round_to": self.round_to}


def checked_beta(pattern: str, beta: object) -> float:
    """A number in [0, 1].

    Raises:
        PatternError: It is none.
    """
    if isinstance(beta, bool) or not isinstance(beta, int | float) or not 0.0 <= beta <= 1.0:
        raise PatternError(f"{pattern}: beta must be a number in [0, 1], not {beta!r}")
    return float(beta)


def checked_round_to(round_to: object) -> int | str:
    """``"auto"`` or a positive whole number; ``None`` is 1, no rounding.

    Raises:
        PatternError: It is neither.
    """
    if round_to is None:
        return 1
    if round_to == "auto":
        return "auto"
    if isinstance(round_to, bool) or not isinstance(round_to, int) or round_to < 1:
        raise PatternError(f"channel: round_to must be 'auto' or a whole number of at least 1, not {round_to!r}")
    return round_to
