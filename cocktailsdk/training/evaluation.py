"""Measuring the networks of a run on the held-out set, each with batch-norm statistics of its own."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from fractions import Fraction
from typing import Any

from torch import nn

from .distributed.recalibration import recalibrate as recalibrate_together
from .distributed.sharing import inputs_of
from .metrics import Score, mean_score, readable
from .session import Session
from .user_code import guarded, guarded_batches

__all__ = ["displayed", "measure", "recalibrate", "score"]

log = logging.getLogger(__name__)


def recalibrate(session: Session, name: str) -> None:
    """Compute a network's batch-norm statistics; several processes do so each on their parts of the batches."""
    batches = guarded_batches(session, session.data.recalibration, "train_loader, recalibrating,")
    together = session.execution is not None and session.execution.sharded

    def forward(model: nn.Module, batch: Any) -> Any:
        return session.options.forward_fn(model, inputs_of(batch))[0]

    with guarded(f"recalibrating {name!r}"):
        recalibrate_together(session.net, name, batches, forward, session.ranks, together=together)


def score(session: Session, name: str) -> Score:
    """Recalibrate a network's statistics and measure it on the held-out batches; higher is better."""
    recalibrate(session, name)
    return measure(session, name)


def measure(session: Session, name: str, batches: Iterable[Any] | None = None) -> Score:
    """Measure a network, with the statistics that it has, on the held-out batches or on some; higher is better."""
    net, options, held_out = session.net, session.options, session.data.held_out
    assert held_out is not None
    with guarded(f"measuring {name!r} on held-out data"), net.using(name, changes="discard"):
        scored = guarded_batches(session, batches or held_out, "val_loader")
        result = mean_score(net.model, scored, options.forward_fn, session.metric, session.ranks)
    if result.number != result.number:  # NaN is the one number that does not equal itself
        log.warning(
            "the metric of %s is not finite (mean of %d scores): it is recorded as NaN, and never chosen",
            name,
            result.count,
        )
    return result.negated() if options.settings.evaluation.metric_mode == "min" else result


def displayed(session: Session, value: Fraction) -> float:
    """A score as the user's metric gave it, undoing the sign of ``metric_mode="min"``; NaN where it was not finite."""
    return -readable(value) if session.options.settings.evaluation.metric_mode == "min" else readable(value)
