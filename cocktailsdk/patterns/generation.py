"""Unified mask generation over all patterns and rounds (method: UMG)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from ..errors import PatternError
from ..graph import Coupling, Weight
from ..masks import Mask
from .base import UMG, Pattern, Subnet
from .scoring import PatternScores


def in_order(patterns: Sequence[Pattern]) -> tuple[Pattern, ...]:
    """Patterns such that each comes after those whose masks it wants to see; otherwise in the order given.

    A name in ``Pattern.after`` stands for the pattern of that name and for all whose masks enter that term.

    Raises:
        PatternError: Two patterns wait for each other.
    """
    rest, out = list(patterns), []
    while rest:
        ready = next((p for p in rest if not any({q.name, q.term} & set(p.after) for q in rest if q is not p)), None)
        if ready is None:
            raise PatternError(f"patterns {', '.join(repr(p.name) for p in rest)} wait for each other ('after')")
        rest = [p for p in rest if p is not ready]
        out.append(ready)
    return tuple(out)


def rounds_of(patterns: Sequence[Pattern], total: int | None = None) -> tuple[dict[str, tuple[Subnet, ...]], ...]:
    """For each round, which subnets of each pattern train in it; patterns in the order in which masks are made.

    Args:
        patterns: The patterns.
        total: Number of rounds; by default as many as the longest pattern has levels.

    Raises:
        PatternError: A pattern's rounds leave out one of its subnets.
    """
    if total is None:
        total = max(len(p.subnets()) for p in patterns)
    ordered = in_order(patterns)
    plans = {p.name: p.rounds(total) for p in ordered}
    for p in ordered:
        made = {s.name for r in plans[p.name] for s in r}
        missing = [s.name for s in p.subnets() if s.name not in made]
        if missing or len(plans[p.name]) != total:
            raise PatternError(
                f"pattern {p.name!r}: rounds({total}) gives {len(plans[p.name])} rounds and leaves out {missing}"
            )
    return tuple({name: plan[k] for name, plan in plans.items()} for k in range(total))


def make_all_masks(
    patterns: Sequence[Pattern],
    coupling: Coupling,
    eligible: tuple[Weight, ...],
    values: Mapping[str, Tensor],
    scores: PatternScores | None = None,
) -> dict[str, Mask]:
    """Every subnet's mask from the weights as they are, as the rounds of training would make them.

    Args:
        patterns: The patterns.
        coupling: The model's coupling.
        eligible: The weights that patterns of elements may touch.
        values: The weights by name.
        scores: How patterns rank; by default by magnitude.

    Returns:
        By subnet name, patterns in the order given.
    """
    by_name = {p.name: p for p in patterns}
    scores = scores or PatternScores()
    masks: dict[str, Mask] = {}
    last: dict[str, Mask] = {}
    for plan in rounds_of(patterns):
        made: dict[str, Mask] = {}
        for name, subnets in plan.items():
            pattern = by_name[name]
            for s in subnets:
                if s.name not in masks:
                    previous = last.get(name) if pattern.nested else None
                    umg = UMG(coupling, eligible, values, previous, dict(made))
                    masks[s.name] = pattern.mask(s, scores.seen_by(pattern, umg, s))
                    last[name] = masks[s.name]
            if subnets:
                made[name] = masks[subnets[-1].name]
    return {s.name: masks[s.name] for p in patterns for s in p.subnets()}
