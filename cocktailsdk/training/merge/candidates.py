"""Judging merged candidates on as little of the held-out data as decides (merging, exact)."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from ...utils.nested import nbytes
from ..distributed.sharing import part_of
from ..evaluation import measure, recalibrate
from ..metrics import NothingScored, Score, counts_hits, hits_of, mean_score
from ..session import Session, load_tensors
from ..user_code import guarded_batches
from .alpha_search import Choice, choose_alpha, interpolate, lacking, layer_of

__all__ = ["Candidates", "Cell", "doubling", "hardest_first", "regrouped"]

Cell = tuple[str, int]


class Candidates:
    """Merged weights of one round with another's, judged a cell at a time: one network on one part of the held-out set.

    Where the metric counts hits, examples are regrouped once for the whole search, those first that round 1's networks
    miss most, and parts double in size: the first ones hold most misses, which is what decides. Statistics are
    recalibrated once for each network and coefficient, weights interpolated once for each coefficient.

    Args:
        session: Of the run.
        merged: What is merged so far.
        other: The next round's weights.
        names: The networks that are judged.

    Attributes:
        layers: Modules that have parameters of their own.
        proposed: Coefficients by layer, each set under a number above 1 that stands for the set as an ``alpha``.
        cells: All that is judged at a coefficient.
    """

    def __init__(
        self, session: Session, merged: Mapping[str, Tensor], other: Mapping[str, Tensor], names: Sequence[str]
    ) -> None:
        self.session, self.merged, self.other, self.names = session, merged, other, names
        self.layers = list(dict.fromkeys(layer_of(name) for name, _ in session.net.model.named_parameters()))
        self.proposed: dict[float, Mapping[str, float]] = {}
        self._loaded: float | None = None
        self._recalibrated: set[str] = set()
        self._batches = list(session.merging.batches or [])
        self._parts = doubling(len(self._batches)) if self._batches else [range(0)]
        self.cells: list[Cell] = [(name, part) for part in range(len(self._parts)) for name in names]
        self._bytes = [nbytes(batch) for batch in self._batches]
        guarded = guarded_batches(session, session.data.recalibration, "train_loader, recalibrating,")
        self._recalibration_bytes = session.ranks.from_main(lambda: sum(map(nbytes, guarded)))

    def choose(self, alphas: Sequence[float], judged: Callable[[float, int], None]) -> Choice:
        """The best of some coefficients; see :func:`~.alpha_search.choose_alpha`."""
        known = self.session.merging.scores
        return choose_alpha(alphas, self.cells, self.judge, known, judged, order=self.order, networks=len(self.names))

    def forget(self) -> None:
        """The model's weights were changed meanwhile."""
        self._loaded = None

    def order(self, latest: Mapping[Cell, Score]) -> list[Cell]:
        """All cells, those first that lacked most for what they cost, a network's in the order of its parts.

        A network's parts go in blocks, each the run of parts from where the block before ended that lacks most for its
        cost: recalibration is paid with the first part, so that a cheap second one may be worth going on to.
        """
        blocks: list[tuple[float, list[Cell]]] = []
        for name in dict.fromkeys(name for name, _ in latest):
            cells = [(name, part) for part in range(len(self._parts))]
            while cells:
                lacked = itertools.accumulate(lacking(latest[cell]) for cell in cells)
                cost = itertools.accumulate(self._cost(cell) for cell in cells)
                ratios = [a / b for a, b in zip(lacked, cost, strict=True)]
                size = ratios.index(max(ratios)) + 1
                blocks.append((max(ratios), cells[:size]))
                cells = cells[size:]
        return [cell for _, block in sorted(blocks, key=lambda b: -b[0]) for cell in block]

    def _cost(self, cell: Cell) -> float:
        own = sum(self._bytes[i] for i in self._parts[cell[1]])
        return own + (self._recalibration_bytes if cell[1] == 0 else 0) + 1

    def judge(self, alpha: float, cell: Cell) -> Score:
        """A cell's part of the network's metric, at a coefficient of the merged weights."""
        session, (name, part) = self.session, cell
        if alpha != self._loaded:
            shares = self.proposed.get(alpha)
            load_tensors(session.net.model, interpolate(self.merged, self.other, alpha, shares))
            self._loaded, self._recalibrated = alpha, set()
        if name not in self._recalibrated:
            recalibrate(session, name)
            self._recalibrated.add(name)
        batches = [self._batches[i] for i in self._parts[part]]
        try:
            score = measure(session, name, batches or None)
        except NothingScored:  # every label of this part is ignored
            score = Score(Fraction(0), Fraction(0))
        # counted once there is a result: the run may be stopped before
        if not any((alpha, (name, p)) in session.merging.scores for p in range(len(self._parts))):
            session.history.judged += 1
        session.history.judged_batches += len(batches)
        if not batches:
            return score
        share = Fraction(score.count, session.merging.score_count)
        return Score(score.value * share, None if score.maximum is None else score.maximum * share, score.count)


def doubling(count: int) -> list[range]:
    """Batches in parts of 1, 1, 2, 4, … and what is left."""
    out, start, size = [], 0, 1
    while start < count:
        stop = min(start + size, count)
        out.append(range(start, stop))
        size, start = max(stop, 1), stop
    return out


def regrouped(batches: Sequence[Any], order: Int[Tensor, " examples"]) -> list[Any] | None:
    """Batches of the same sizes with all examples in another order.

    Args:
        batches: Trees of tensors, the first axis of each over examples.
        order: Positions of the examples.

    Returns:
        ``None`` where the batches cannot be regrouped: their tensors differ in shape beyond the first axis.
    """
    flat = [tree_flatten(batch) for batch in batches]
    leaves, spec = flat[0]
    sizes = [leaf[0].shape[0] if leaf and isinstance(leaf[0], Tensor) and leaf[0].ndim else 0 for leaf, _ in flat]
    for (parts, other), size in zip(flat, sizes, strict=True):
        if other != spec or not parts:
            return None
        for part, first in zip(parts, leaves, strict=True):
            alike = isinstance(part, Tensor) and isinstance(first, Tensor) and part.ndim > 0
            if not alike or part.shape[0] != size or part.shape[1:] != first.shape[1:]:
                return None
    if sum(sizes) != len(order):
        return None
    whole = [torch.cat(column) for column in zip(*(parts for parts, _ in flat), strict=True)]
    columns = [tensor[order.to(tensor.device)].split(sizes) for tensor in whole]
    return [tree_unflatten(list(row), spec) for row in zip(*columns, strict=True)]


@torch.no_grad()
def hardest_first(session: Session, names: Sequence[str]) -> tuple[Int[Tensor, " examples"] | None, int]:
    """In which order to judge held-out examples: those first that most of some networks, as they stand, miss.

    Returns:
        The order, and the number of scores of a pass; ``None`` and 0 where the metric does not count hits of examples,
        or the data are too large to be kept.
    """
    assert session.data.held_out is not None
    ranks = session.ranks
    measure(session, names[0])
    if (batches := session.data.held_out.cached) is None:
        return None, 0
    misses: list[Tensor] = [torch.zeros(0)] * len(batches)
    total = 0
    for name in names:
        recalibrate(session, name)
        for i, batch in enumerate(batches):
            part = None if ranks.world == 1 else part_of(batch, ranks)
            scores, counts = _scores(session, name, part.batch if part else batch)
            if part is not None and not part.count:
                scores, counts = scores[:0], counts[:0]
            if scores.dtype != torch.bool or not scores.ndim:
                return None, 0
            bad = (scores if session.options.settings.evaluation.metric_mode == "min" else ~scores) & counts
            missed = bad.flatten(1).sum(1) if bad.ndim > 1 else bad.long()
            if part is not None:
                if ranks.any(len(missed) != part.count):  # of some labels only: of which examples is not known
                    return None, 0
                whole = missed.new_zeros(part.total)
                whole[part.rows.start : part.rows.stop] = missed
                missed = ranks.sum(whole)
            misses[i] = missed.cpu() + (misses[i] if len(misses[i]) else 0)
            total += int(counts.sum())
    session.net.statistics.clear()
    total = int(ranks.sum(torch.tensor(total)))
    return torch.cat(misses).argsort(descending=True, stable=True), total // len(names)


def _scores(session: Session, name: str, batch: Any) -> tuple[Tensor, Tensor]:
    """A network's scores for a batch, and which of them count; in the shape of the examples' labels."""
    found: list[tuple[Tensor, Tensor]] = []
    metric = session.metric

    def keep(output: Any, target: Any) -> Tensor:
        if counts_hits(metric):  # which gives no scores for ignored labels, so that examples could not be told
            ignored = metric.keywords.get("ignored") if isinstance(metric, functools.partial) else None
            found.append(hits_of(output, target, ignored))
        else:
            scores = metric(output, target)
            found.append((scores, torch.ones_like(scores, dtype=torch.bool)))
        return found[-1][0]

    with session.net.using(name), contextlib.suppress(NothingScored):
        mean_score(session.net.model, [batch], session.options.forward_fn, keep)
    return found[0]
