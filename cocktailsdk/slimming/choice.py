"""Which units go: the least important ones, within each group or over several."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float64, Int64
from torch import Tensor, nn

from ..errors import PatternError
from ..graph import Coupling, Group
from ..graph.weight_graph import run_weight_graph
from ..patterns.base import UMG
from ..patterns.channel import rounded_units, rounding_step, unit_scores
from .ratios import Pool

__all__ = ["Choice", "Importance", "scores_of"]

MAGNITUDE = "magnitude"

Importance = str | Callable[[UMG], Tensor]
"""``"magnitude"``, or a function of the coupling and the model's tensors that returns a score for each unit."""


def scores_of(model: nn.Module, coupling: Coupling, importance: Importance, scope: str) -> Float64[Tensor, " units"]:
    """The importance of every unit, comparable among the units that are ranked together.

    Magnitudes (:func:`cocktailsdk.patterns.channel.unit_scores`) are divided by their mean over the group where groups
    are compared with one another: a unit that ten layers make, or a head of 64 channels, is not for that reason worth
    more than others. What a function returns is taken as it is.

    Raises:
        PatternError: A function returned something else than one finite number for each unit.
    """
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    graphs = coupling.trace.computed if coupling.trace is not None else {}
    values = {name: p.detach() for name, p in model.named_parameters()}
    values |= {name: run_weight_graph(graph, tensors.__getitem__) for name, graph in graphs.items()}
    umg = UMG(coupling, (), values)
    if callable(importance):
        custom = importance(umg)
        expected_shape = (coupling.n_units,)
        if not isinstance(custom, Tensor) or tuple(custom.shape) != expected_shape:
            found = f"shape {list(custom.shape)}" if isinstance(custom, Tensor) else f"a {type(custom).__name__}"
            raise PatternError(
                f"importance must return a tensor of shape {list(expected_shape)}, one score a unit, not {found}"
            )
        scores = custom.detach().cpu().to(torch.float64)
        if not bool(torch.isfinite(scores).all()):
            raise PatternError("importance returned scores that are not finite")
        return scores
    scores = unit_scores(umg, 1.0)
    if scope == "global":
        for g in coupling.groups:
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
