"""Measuring the networks of a run on the held-out set, each with batch-norm statistics of its own."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

from ..patterns.base import DENSE
from ..utils.batchnorm import frozen_norms, running_norms
from .distributed.ranks import Ranks
from .distributed.sharing import Part, inputs_of
from .metrics import Score, mean_score, readable
from .session import Session
from .user_code import guarded, guarded_batches

__all__ = ["compare_dense", "displayed", "measure", "recalibrate", "score", "warn_if_untrained"]

log = logging.getLogger(__name__)

CHANCE = 1.2
"""Weights are taken for untrained up to this multiple of the accuracy of guessing."""
DENSE_LOSS = 0.005
"""Accuracy that the dense network may lose before a run warns."""


def recalibrate(session: Session, name: str) -> None:
    """Compute a network's batch-norm statistics; several processes do so each on their parts of the batches.

    The statistics are the average over all parts then, the same bits in every process. A part weighs as every other;
    its variance is that of its own examples, as in training where batch norms are not synchronised.
    """
    net = session.net
    batches = guarded_batches(session, session.data.recalibration, "train_loader, recalibrating,")

    def forward(model: nn.Module, batch: Any) -> Any:
        return session.options.forward_fn(model, inputs_of(batch))[0]

    with guarded(f"recalibrating {name!r}"):
        if session.ranks.world == 1:
            net.recalibrate(name, batches, forward)
        else:
            _recalibrate_together(session, name, list(batches), forward)


def _recalibrate_together(
    session: Session, name: str, mine: list[Any], forward: Callable[[nn.Module, Any], Any]
) -> None:
    net, frozen = session.net, frozen_norms(session.net.model)
    # where weights are sharded a pass needs all processes, so that none may leave one out
    together = session.execution is not None and session.execution.sharded
    counted = [b for b in mine if together or not isinstance(b, Part) or b.count]
    net.recalibrate(name, counted or mine, forward)
    # averaging frozen ones over processes would round them
    statistics = {key: t for key, t in net.statistics[name].items() if key.rpartition(".")[0] not in frozen}
    if not statistics:
        return
    _average(list(statistics.values()), len(counted), session.ranks)
    if name == DENSE:
        tensors = dict(net.model.named_buffers())
        for key, value in statistics.items():
            tensors[key].copy_(value)
        for path, norm in running_norms(net.model).items():
            if path not in frozen and norm.num_batches_tracked is not None:
                norm.num_batches_tracked.fill_(len(mine))


def _average(tensors: list[Tensor], weight: int, ranks: Ranks) -> None:
    """Weighted averages over processes, in place."""
    flat = torch.cat([tensor.reshape(-1).float() * weight for tensor in tensors])
    total = ranks.sum(torch.cat([flat, flat.new_tensor([float(weight)])]))
    for tensor, part in zip(tensors, (total[:-1] / total[-1]).split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(part.reshape(tensor.shape))


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


def compare_dense(session: Session) -> None:
    """Log the dense network's metric before and after a run from trained weights; warn if accuracy fell too far."""
    before, after = session.history.before.get(DENSE), session.net.metrics.get(DENSE)
    if before is None or after is None:
        return
    if session.options.metric is not None or session.classes is None:  # a metric of the user's has any scale
        log.info("the dense network's held-out metric was %.4f before training and is %.4f", before, after)
    elif before - after <= DENSE_LOSS:
        log.info("the dense network's accuracy was %.2f %% before training and is %.2f %%", 100 * before, 100 * after)
    else:
        log.warning(
            "the dense network's accuracy fell from %.2f %% to %.2f %%: train more steps, lower the learning rate "
            "(trainer.suggest_lr()), or give the dense network more passes, recipe=dataclasses.replace("
            "recipe_named(%r), allocation=PassAllocation(dense=0.4))",
            100 * before,
            100 * after,
            session.options.recipe.name,
        )


def warn_if_untrained(session: Session) -> None:
    """Warn if weights that are said to be trained classify no better than chance."""
    before, classes = session.history.before.get(DENSE), session.classes
    if session.options.metric is not None or before is None or classes is None or not classes.size:
        return
    if before <= CHANCE / classes.size:
        log.warning(
            'start="pretrained", and the weights have an accuracy of %.1f %% on val_loader, which is chance for %d '
            'classes: load the trained weights before sparsify(), or train with start="scratch"',
            100 * before,
            classes.size,
        )


def displayed(session: Session, value: Fraction) -> float:
    """A score as the user's metric gave it, undoing the sign of ``metric_mode="min"``; NaN where it was not finite."""
    return -readable(value) if session.options.settings.evaluation.metric_mode == "min" else readable(value)
