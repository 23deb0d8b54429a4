"""How a run divides its passes among the networks: shares by pattern, and within a pattern by measured need."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any

from ...errors import TrainingError
from ...patterns.base import DENSE

__all__ = ["PassAllocation"]

WEIGHTS: Mapping[str, float] = {"channel": 0.49, "unstructured": 0.29, "n:m": 0.22}
LEAST_GAP, LARGEST_GAP = 0.01, 1e30
"""A network that is as good as the teacher still counts as having this gap, in units of the loss. The power of a larger
one than the largest might not be a finite number."""
LEAST_SHARE = 0.1
"""The smallest share of a network, as a fraction of an equal share."""


@dataclass(frozen=True, kw_only=True)
class PassAllocation:
    """Shares of a run's passes: the dense network's, the patterns', and within a pattern each subnet's by need.

    The *gap* of a subnet is its loss on held-out examples minus that of the weights that the run started from. A
    subnet's share within its pattern is ``floor / members + (1 - floor) * gap**power / sum(gap**power)``. Shares of
    patterns do not depend on need: measured over all patterns, channel subnets took what N:M subnets need.

    Gaps are measured at fixed fractions of the run, on the same examples each time, so that a resumed run divides its
    passes in the same way.

    Attributes:
        dense: The dense network's share of all passes, in [0, 1). It protects the accuracy of the dense network.
        patterns: Weights of patterns by name. Passes that the dense network does not take are divided among the net's
            patterns in proportion to them.
        others: The weight of every other pattern.
        floor: Part of a pattern's passes that is divided equally among its subnets, in [0, 1]. At 1 nothing is
            measured.
        power: Exponent of the gap, in [0, 4].
        measure_at: Fractions of the run's steps at which gaps are measured, in [0, 1). Measurements that are fewer
            steps apart than half the number of networks are left out.
        examples: Held-out examples that gaps are measured on; whole batches are taken until there are as many.

    Raises:
        TrainingError: A field makes no sense; it is named.
    """

    dense: float = 0.18
    patterns: Mapping[str, float] = field(default_factory=lambda: dict(WEIGHTS))
    others: float = 0.3
    floor: float = 0.2
    power: float = 0.5
    measure_at: Sequence[float] = (0.0, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8)
    examples: int = 128

    def __post_init__(self) -> None:
        if not isinstance(self.patterns, Mapping):
            raise TrainingError(
                f'PassAllocation.patterns must be weights by name, such as {{"channel": 1.0}}, got {self.patterns!r}'
            )
        if not isinstance(self.measure_at, Iterable):
            raise TrainingError(
                f"PassAllocation.measure_at must be a list of fractions, such as (0.0, 0.5), got {self.measure_at!r}"
            )
        # plain, so that a run's configuration can hold them
        object.__setattr__(self, "patterns", {name: _plain(weight) for name, weight in self.patterns.items()})
        object.__setattr__(self, "measure_at", tuple(map(_plain, self.measure_at)))
        for one in ("dense", "others", "floor", "power", "examples"):
            object.__setattr__(self, one, _plain(getattr(self, one)))
        ranges = {
            "dense": (self.dense, "in 0 … 1, below 1", lambda x: 0 <= x < 1),
            "others": (self.others, "at least 0", lambda x: x >= 0),
            "floor": (self.floor, "in 0 … 1", lambda x: 0 <= x <= 1),
            "power": (self.power, "in 0 … 4", lambda x: 0 <= x <= 4),
            "examples": (self.examples, "at least 1", lambda x: x >= 1),
            **{f"patterns[{n!r}]": (w, "at least 0", lambda x: x >= 0) for n, w in self.patterns.items()},
            **{
                f"measure_at[{i}]": (x, "in 0 … 1, below 1", lambda x: 0 <= x < 1)
                for i, x in enumerate(self.measure_at)
            },
        }
        for name, (value, rule, holds) in ranges.items():
            number = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
            if not number or not holds(value):
                raise TrainingError(f"PassAllocation.{name} must be a number {rule}, got {value!r}")

    def measured_steps(self, steps: int, networks: int) -> tuple[int, ...]:
        """The steps before which gaps are measured.

        Args:
            steps: Optimizer steps of the run.
            networks: How many networks there are.
        """
        if self.floor == 1:
            return ()
        chosen: list[int] = []
        for fraction in sorted(self.measure_at):
            step = int(fraction * steps)
            if not chosen or step - chosen[-1] >= max(networks / 2, 1):
                chosen.append(step)
        return tuple(chosen)

    def _need(self, gap: float) -> float:
        return min(max(gap, LEAST_GAP), LARGEST_GAP) ** self.power

    def shares(self, subnets: Mapping[str, Sequence[str]], gaps: Mapping[str, float]) -> dict[str, float]:
        """Each network's share of the next passes; together they are 1.

        Args:
            subnets: Names by pattern, from the least sparse.
            gaps: By subnet; empty if nothing was measured: then a subnet's need is its place in its pattern, 1, 2, ….
        """
        present = {pattern: names for pattern, names in subnets.items() if names}
        weights = {pattern: self.patterns.get(pattern, self.others) for pattern in present}
        total = sum(weights.values())
        if not total:
            return {DENSE: 1.0}
        out = {DENSE: self.dense}
        for pattern, names in present.items():
            need = {name: self._need(gaps[name]) if gaps else i + 1.0 for i, name in enumerate(names)}
            part, whole = (1 - self.dense) * weights[pattern] / total, sum(need.values())
            for name in names:
                out[name] = part * (self.floor / len(names) + (1 - self.floor) * need[name] / whole)
        least = LEAST_SHARE / len(out)
        raised = {name: max(share, least) if share > 0 else 0.0 for name, share in out.items()}
        scale = sum(raised.values())
        return {name: share / scale for name, share in raised.items()}


def _plain(value: Any) -> Any:
    """A number of any kind (NumPy's, fractions) as one of Python's; anything else as it is."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return value
    return int(value) if isinstance(value, Integral) else float(value)
