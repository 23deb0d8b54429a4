"""Measured need: every network's loss on the same held-out examples, from which the next passes are shared."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from ..patterns.base import DENSE
from .distributed.sharing import examples
from .events import NeedMeasured
from .recipes import ScheduleContext
from .session import Session
from .step.distill import Classes, untouched_buffers
from .step.forward import loss_of, output_tensor
from .still_improving import Measurement, improvement_warning, still_improving
from .user_code import emit, guarded, guarded_batches

__all__ = ["held_out_losses", "measure_if_due", "warn_if_improving"]

log = logging.getLogger(__name__)


def measure_if_due(session: Session, context: ScheduleContext) -> None:
    """Before a step: where the recipe's allocation says so, measure all networks and share the passes anew."""
    shares, measured = session.shares, session.history.measured
    if shares is None or not shares.is_due(context.step, measured):
        return
    losses, accuracies = held_out_losses(session, (DENSE, *context.names))
    measured.append({"step": context.step, "losses": losses, "accuracies": accuracies})
    shares.update(measured)
    measured[-1]["shares"] = dict(shares.shares)
    passes = session.history.rounds[-1].made or {}
    reference = measured[0]["losses"][DENSE]
    emit(session, NeedMeasured(context.round, context.step, losses, dict(shares.shares), dict(passes), reference))


def warn_if_improving(session: Session) -> None:
    """At the end of a run: say which subnetworks a longer one would make better, as its measurements show."""
    history = session.history
    measurements = {
        name: [Measurement(m["step"], m["losses"][name], m["accuracies"].get(name)) for m in history.measured]
        for name in session.names(session.options.rounds)
    }
    if (sentence := improvement_warning(still_improving(measurements, session.options.all_steps))) is not None:
        log.warning("%s", sentence)


@torch.no_grad()
def held_out_losses(session: Session, names: tuple[str, ...]) -> tuple[dict[str, float], dict[str, float]]:
    """The mean loss of each network on the first held-out examples, and its accuracy if the run's metric is that.

    The passes are those of training: batch norms use the batch. Training batches are used if there is no
    ``val_loader``. Buffers and generators are left as they were. The main process's numbers count, so that all
    processes give out passes alike.
    """
    assert session.shares is not None
    if not session.shares.batches:
        session.shares.batches = list(_first_batches(session, session.shares.examples))
    model, options, execution = session.net.model, session.options, session.execution
    assert execution is not None
    classes = session.classes if options.metric is None else None
    losses: dict[str, float] = {}
    accuracies: dict[str, float] = {}
    with guarded("measuring the loss on held-out data"), untouched_buffers(model):
        for name in names:
            session.seed("need", session.history.steps)  # dropout is the same for all networks
            with session.net.using(name, statistics=False, changes="discard"):
                found = [execution.measured(batch) for batch in session.shares.batches]
            every = [loss_of(output, target, options.loss_fn).double() for output, target in found]
            losses[name] = float(torch.stack(every).mean())
            if classes is not None:
                accuracies[name] = _accuracy(found, classes)
    return session.ranks.from_main(lambda: (losses, accuracies))


def _accuracy(found: Sequence[tuple[Any, Any]], classes: Classes) -> float:
    hits: list[Tensor] = []
    for output, target in found:
        logits = output_tensor(output)
        assert logits is not None
        rows, labels = classes.positions(logits, target)
        counted = classes.counted(labels)
        hits.append(rows[counted].argmax(-1) == labels[counted])
    return float(torch.cat(hits).double().mean())


def _first_batches(session: Session, count: int) -> Iterator[Any]:
    """Whole batches of the held-out data, until they have so many examples; as many in all processes."""
    held_out = session.data.held_out
    loader, name = (held_out, "val_loader") if held_out is not None else (session.data.recalibration, "train_loader")
    taken: list[Any] = []
    for batch in guarded_batches(session, loader, name):
        taken.append(batch)
        count -= max(examples(batch), 1)
        if count <= 0:
            break
    # a pass of sharded weights needs all processes, and parts of batches may differ in size
    yield from islice(taken, session.ranks.least(len(taken)))
