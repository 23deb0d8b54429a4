"""Which units go: those of least score, within each group or over several. Patterns and ``slim`` choose alike."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float64, Int64
from torch import Tensor

from ..errors import PatternError
from ..graph import Coupling, Group

__all__ = [
    "Choice",
    "Pool",
    "checked_round_to",
    "checked_scope",
    "comparable",
    "kept_units",
    "pooled",
    "rounded_units",
    "rounding_step",
    "widths_before_rounding",
]

SCOPES = ("group", "global")

AUTO_MULTIPLE = 8  # what GPUs' matrix units want
AUTO_CHANNELS = 256  # groups at least this wide


@dataclass(frozen=True)
class Pool:
    """Groups whose units are ranked together.

    Attributes:
        groups: The groups.
        ratio: The share of their units that goes.
    """

    groups: tuple[Group, ...]
    ratio: float


def pooled(groups: Sequence[Group], ratio: float, scope: str) -> tuple[Pool, ...]:
    """Pools of one ratio: all groups together (``"global"``), or each by itself (``"group"``)."""
    return (Pool(tuple(groups), ratio),) if scope == "global" else tuple(Pool((g,), ratio) for g in groups)


def comparable(scores: Float64[Tensor, " units"], groups: Sequence[Group]) -> Float64[Tensor, " units"]:
    """Scores divided by the mean of their group, so that units of several groups can be ranked together.

    A unit that ten layers make, or a head of 64 channels, is not for that reason worth more than others.
    """
    scores = scores.clone()
    for g in groups:
        mean = float(scores[g.start : g.stop].mean())
        if mean > 0.0:
            scores[g.start : g.stop] /= mean
    return scores


@dataclass(frozen=True)
class Choice:
    """How units are chosen; what goes at a lower ratio also goes at a higher.

    Attributes:
        coupling: The model's coupling.
        scores: The importance of every unit.
        pools: Groups whose units are ranked together, and the share of them that goes. Groups in none stay whole.
        round_to: The channels kept in each group are rounded to a multiple of this; see :func:`rounded_units`.
        min_width: At least this many channels of each group stay, or all where there are no more.
        previous: Units that are removed already, and stay removed.
    """

    coupling: Coupling
    scores: Float64[Tensor, " units"]
    pools: tuple[Pool, ...]
    round_to: int | str = 1
    min_width: int = 1
    previous: Bool[Tensor, " units"] | None = None

    def removed(self, factor: float = 1.0) -> Bool[Tensor, " units"]:
        """The units that go when every pool's ratio is multiplied by a factor (to at most 1).

        Of a pool's n units ``round(ratio * n)`` go, or as many as the minimum widths let; those of least score, ties by
        position. Then what is left of each group is rounded.
        """
        removed = torch.zeros(self.coupling.n_units, dtype=torch.bool)
        for pool, candidates in zip(self.pools, self._candidates, strict=True):
            # Rounding may have removed more at the level before than this level asks for.
            count = max(round(min(factor * pool.ratio, 1.0) * sum(g.size for g in pool.groups)), self._before(pool))
            gone = candidates[:count].bincount(minlength=len(pool.groups)).tolist()
            for g, n in zip(pool.groups, gone, strict=True):
                width = max(rounded_units(g, g.size - n, self.round_to), least_units(g, self.round_to, self.min_width))
                removed[self._ascending[g.start : g.start + g.size - width]] = True
        return removed

    def _before(self, pool: Pool) -> int:
        before = self.previous
        return 0 if before is None else sum(int(before[g.start : g.stop].sum()) for g in pool.groups)

    @cached_property
    def _ranks(self) -> Float64[Tensor, " units"]:
        """The scores; what is removed already goes before all others."""
        if self.previous is None:
            return self.scores
        return self.scores.masked_fill(self.previous.to(self.scores.device), -math.inf)

    @cached_property
    def _ascending(self) -> Int64[Tensor, " units"]:
        """The units, each group's from the least score to the greatest in the group's own place."""
        out = torch.arange(self.coupling.n_units)
        for g in self.coupling.groups:
            out[g.start : g.stop] = g.start + self._ranks[g.start : g.stop].argsort(stable=True)
        return out

    @cached_property
    def _candidates(self) -> Sequence[Int64[Tensor, " candidates"]]:
        """For each pool, in the order in which its units go, the position in the pool of each one's group."""
        out = []
        for pool in self.pools:
            kept = [least_units(g, self.round_to, self.min_width) for g in pool.groups]
            units = [self._ascending[g.start : g.stop - least] for g, least in zip(pool.groups, kept, strict=True)]
            owner = torch.cat([torch.full((len(u),), i) for i, u in enumerate(units)])
            out.append(owner[self._ranks[torch.cat(units)].argsort(stable=True)])
        return out


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


def checked_round_to(round_to: object, pattern: str = "channel") -> int | str:
    """``"auto"`` or a positive whole number; ``None`` is 1, no rounding.

    Raises:
        PatternError: It is neither.
    """
    if round_to is None:
        return 1
    if round_to == "auto":
        return "auto"
    if isinstance(round_to, bool) or not isinstance(round_to, int) or round_to < 1:
        raise PatternError(f"{pattern}: round_to must be 'auto' or a whole number of at least 1, not {round_to!r}")
    return round_to


def least_units(group: Group, round_to: int | str = 1, min_width: int = 1) -> int:
    """The fewest units of a group that may stay."""
    step = rounding_step(group, round_to)
    units = max(1, math.ceil(min_width / group.channels))
    return min(group.size, math.ceil(units / step) * step)


def widths_before_rounding(group: Group, kept: int, round_to: int | str = 1) -> tuple[int, int] | None:
    """The fewest and the most units that :func:`rounded_units` turns into ``kept``; ``None`` where none become that.

    Args:
        group: The group.
        kept: How many of its units stay.
        round_to: As there.
    """
    least = least_units(group, round_to)
    found = [n for n in range(least, group.size + 1) if max(rounded_units(group, n, round_to), least) == kept]
    return (found[0], found[-1]) if found else None


def checked_scope(pattern: str, scope: object) -> str:
    """``"group"`` or ``"global"``.

    Raises:
        PatternError: It is neither.
    """
    if scope not in SCOPES:
        raise PatternError(f"{pattern}: scope must be 'group' or 'global', not {scope!r}")
    return str(scope)
