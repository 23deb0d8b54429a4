"""Training a session's net for measurements, and putting everything back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ..utils.modes import modes_restored, train_as_handed
from .session import Session, load_tensors, model_tensors

__all__ = ["dry_run"]


@contextmanager
def dry_run(session: Session) -> Iterator[None]:
    """Inside, the net is in training mode and may be trained; afterwards it is as it was.

    Weights, buffers, gradients, modes, statistics and metrics are restored. Masks must not be changed inside.
    """
    net = session.net
    kept = {name: tensor.clone() for name, tensor in model_tensors(net.model).items()}
    gradients = [(parameter, parameter.grad) for parameter in net.model.parameters()]
    statistics, metrics = dict(net.statistics), dict(net.metrics)
    for parameter, _ in gradients:
        parameter.grad = None  # or the first step would write into the user's
    with modes_restored(net):
        try:
            train_as_handed(net.model)
            yield
        finally:
            load_tensors(net.model, kept)
            for parameter, gradient in gradients:
                parameter.grad = gradient
            net.statistics.clear()
            net.statistics.update(statistics)
            net.metrics.clear()
            net.metrics.update(metrics)
