"""Dense pivot co-training: which network each mini-batch trains (paper, section 3.2)."""

from __future__ import annotations

from collections.abc import Sequence

from ..patterns.base import DENSE

__all__ = ["pivot"]


def pivot(step: int, patterns: Sequence[Sequence[str]]) -> str:
    """The network that trains at a step: dense, a sparse one, dense, the next sparse one, in turn.

    Args:
        step: Step in the round, from 0.
        patterns: By pattern, the names of its subnets of this round. A pattern with several
            takes them in turn, one each time that the pattern has its own turn.

    Returns:
        ``"dense"`` or a subnet's name.

    Example:
        >>> [pivot(i, [["unstructured@0.2"], ["channel@0.1"]]) for i in range(4)]
        ['dense', 'unstructured@0.2', 'dense', 'channel@0.1']
    """
    turns = [names for names in patterns if names]
    if step % 2 == 0 or not turns:
        return DENSE
    turn = step // 2
    names = turns[turn % len(turns)]
    return names[turn // len(turns) % len(names)]
