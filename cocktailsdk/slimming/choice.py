"""Which units go: the least important ones, within each group or over several."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float64, Int64
from torch import Tensor, nn

from ..graph import Coupling, Group
from ..patterns.channel import rounded_units, rounding_step
from ..patterns.scoring import ScoreLike
from .ratios import Pool
from .scoring import UnitScoring

__all__ = ["Choice", "Importance", "scores_of"]

Importance = ScoreLike
"""Deprecated: the name of :data:`~cocktailsdk.patterns.scoring.ScoreLike` in the version before."""


def scores_of(model: nn.Module, coupling: Coupling, importance: ScoreLike, scope: str) -> Float64[Tensor, " units"]:
    """Deprecated: use :meth:`cocktailsdk.slimming.scoring.UnitScoring.of_units`."""
    warnings.warn(
        "scores_of(model, coupling, importance, scope) is UnitScoring.of(importance).of_units(model, coupling, (), "
        "scope) of cocktailsdk.slimming.scoring now; the old function goes with the next version",
        DeprecationWarning,
        stacklevel=2,
    )
    return UnitScoring.of(importance).of_units(model, coupling, (), scope)


@dataclass(frozen=True)
class Choice:
    """How units are chosen; what goes at a lower ratio also goes at a higher.

    Attributes:
        coupling: The model's coupling.
        scores: The score of every unit.
        pools: Groups whose units are ranked together, and the share of them that goes. Groups in none stay whole.
        round_to: The channels kept in each group are rounded to a multiple of this; see
            :func:`cocktailsdk.patterns.channel.rounded_units`.
        min_width: At least this many channels of each group stay, or all where there are no more.
    """

    coupling: Coupling
    scores: Float64[Tensor, " units"]
    pools: tuple[Pool, ...]
    round_to: int | str = 1
    min_width: int = 1

    def removed(self, factor: float = 1.0) -> Bool[Tensor, " units"]:
        """The units that go when every pool's ratio is multiplied by a factor (to at most 1).

        Of a pool's n units ``round(ratio · n)`` go, or as many as the minimum widths let; those of least score, ties by
        position. Then what is left of each group is rounded.
        """
        removed = torch.zeros(self.coupling.n_units, dtype=torch.bool)
        for pool, candidates in zip(self.pools, self._candidates, strict=True):
            count = round(min(factor * pool.ratio, 1.0) * sum(g.size for g in pool.groups))
            gone = candidates[:count].bincount(minlength=len(pool.groups)).tolist()
            for g, n in zip(pool.groups, gone, strict=True):
                width = max(rounded_units(g, g.size - n, self.round_to), self._least(g))
                removed[self._ascending[g.start : g.start + g.size - width]] = True
        return removed

    @cached_property
    def _ascending(self) -> Int64[Tensor, " units"]:
        """The units, each group's from the least score to the greatest in the group's own place."""
        out = torch.arange(self.coupling.n_units)
        for g in self.coupling.groups:
            out[g.start : g.stop] = g.start + self.scores[g.start : g.stop].argsort(stable=True)
        return out

    @cached_property
    def _candidates(self) -> Sequence[Int64[Tensor, " candidates"]]:
        """For each pool, in the order in which its units go, the position in the pool of each one's group."""
        out = []
        for pool in self.pools:
            units = [self._ascending[g.start : g.stop - self._least(g)] for g in pool.groups]
            owner = torch.cat([torch.full((len(u),), i) for i, u in enumerate(units)])
            out.append(owner[self.scores[torch.cat(units)].argsort(stable=True)])
        return out

    def _least(self, group: Group) -> int:
        """The fewest units of a group that may stay."""
        step = rounding_step(group, self.round_to)
        units = max(1, math.ceil(self.min_width / group.channels))
        return min(group.size, math.ceil(units / step) * step)
