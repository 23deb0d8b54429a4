"""Measured need: every network's loss on the same held-out examples, from which the next passes are shared."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from ..patterns.base import DENSE
from ..utils.batchnorm import running_norms
from ..utils.losses import loss_of
from .distributed.sharing import examples
from .events import NeedMeasured
from .session import Session
from .step.distill import Classes, untouched_buffers
from .step.forward import output_tensor
from .still_improving import Measurement, improvement_warning, still_improving
from .user_code import emit, guarded, guarded_batches

__all__ = ["held_out_losses", "measure_if_due", "warn_if_improving"]

log = logging.getLogger(__name__)


def measure_if_due(session: Session, round_: int, step: int) -> None:
    """Before a step: where the recipe's allocation says so, measure all networks and share the passes anew."""
    shares, measured = session.shares, session.history.measured
    if shares is None or not shares.is_due(step, measured):
        return
    context = session.context_at(round_, step)
    losses, accuracies = held_out_losses(session, (DENSE, *context.names))
    measured.append({"step": context.step, "losses": losses, "accuracies": accuracies})
    shares.update(measured)
    measured[-1]["shares"] = dict(shares.shares)
    passes = session.history.rounds[-1].made or {}
    reference = measured[0]["losses"][DENSE]
    emit(session, NeedMeasured(context.round, context.step, losses, dict(shares.shares), dict(passes), reference))


def warn_if_improving(session: Session) -> None:
    """At the end of a run: say which subnetworks a longer one would make better, as its measurements show."""
    measured = session.history.measured
    if not measured:
        return

    def of(name: str) -> list[Measurement]:
        return [Measurement(m["step"], m["losses"][name], m["accuracies"].get(name)) for m in measured]

    measurements = {name: of(name) for name in session.names(session.options.rounds) if name != DENSE}
    dense = of(DENSE)
    best = min(dense, key=lambda one: one.loss if math.isfinite(one.loss) else math.inf)
    if best.accuracy is not None:
        best = replace(best, accuracy=max(one.accuracy for one in dense if one.accuracy is not None))
    final = session.net.metrics if best.accuracy is not None and DENSE in session.net.metrics else {}
    if final:  # both on all held-out data
        best = replace(best, accuracy=final[DENSE])
    found = still_improving(measurements, session.options.all_steps, best, final)
    if (sentence := improvement_warning(found)) is not None:
        log.warning("%s", sentence)


@torch.no_grad()
def held_out_losses(session: Session, names: tuple[str, ...]) -> tuple[dict[str, float], dict[str, float]]:
    """The mean loss of each network on the first held-out examples, and its accuracy if the run's metric is that.

    The passes are those of training: batch norms use the batch, so that batches of one example are left out. Training
    batches are used if there is no ``val_loader``, or none of its batches can be. Buffers and generators are left as
    they were. The main process's numbers count, so that all processes give out passes alike.
    """
    assert session.shares is not None
    if not session.shares.batches:
        # the loader may be the training loader, which cannot be iterated over twice at once (workers that are kept,
        # an ``__iter__`` that returns the loader itself); the stream finds its place again
        session.data.stream.close()
        session.shares.batches = _measurable(session)
    model, options, execution = session.net.model, session.options, session.execution
    assert execution is not None
    classes = session.classes if options.metric is None else None
    losses: dict[str, float] = {}
    accuracies: dict[str, float] = {}
    counted: list[bool] | None = None
    with guarded("measuring the loss on held-out data"), untouched_buffers(model):
        for name in names:
            session.seed("need", session.history.steps)  # dropout is the same for all networks
            with session.net.using(name, statistics=False, changes="discard"):
                found = [execution.measured(batch) for batch in session.shares.batches]
            every = [loss_of(output, target, options.loss_fn).double() for output, target in found]
            if counted is None:
                # of the dense network: a batch without labels that count, or with NaN in it, says nothing of any other
                counted = [bool(loss.isfinite()) for loss in every]
            kept = [loss for loss, counts in zip(every, counted, strict=True) if counts]
            losses[name] = float(torch.stack(kept or every).mean())
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


def _measurable(session: Session) -> list[Any]:
    """The batches to measure on: held-out ones, or training batches where there are none of use.

    A batch norm that normalizes by the batch cannot do so with one example, or its output means something else.
    """
    assert session.shares is not None
    held_out, training = session.data.held_out, (session.data.recalibration, "train_loader")
    loaders: list[tuple[Iterable[Any], str]] = [training] if held_out is None else [(held_out, "val_loader"), training]
    norms = any(norm.training for norm in running_norms(session.net.model).values())
    for least in (2, 1) if norms else (1,):
        for loader, name in loaders:
            batches = list(_first_batches(session, loader, name, least))
            if session.ranks.least(len(batches)):  # all processes must agree
                return batches
    return []


def _first_batches(session: Session, loader: Iterable[Any], name: str, least: int) -> Iterator[Any]:
    """Whole batches of a loader, until they have enough examples; as many in all processes.

    Args:
        session: Of the run.
        loader: Of the batches.
        name: What it is called in errors.
        least: Examples that a batch must have.
    """
    assert session.shares is not None
    count = session.shares.examples
    taken: list[Any] = []
    for batch in guarded_batches(session, loader, name):
        if examples(batch) < least:
            continue
        taken.append(batch)
        count -= max(examples(batch), 1)
        if count <= 0:
            break
    # a pass of sharded weights needs all processes, and parts of batches may differ in size
    yield from islice(taken, session.ranks.least(len(taken)))
