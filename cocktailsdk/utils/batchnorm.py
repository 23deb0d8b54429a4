"""Norms that keep running statistics: which they are, which are frozen, and recalibration for the active network."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import CocktailError
from .blame import MISFITS, blamed
from .modes import evaluating, modes_restored, train_as_handed
from .nested import form_of, outputs_of

Forward = Callable[[nn.Module, Any], Any]

Norm = _BatchNorm | nn.InstanceNorm1d | nn.InstanceNorm2d | nn.InstanceNorm3d
"""Batch norms of any kind (synchronised ones too), and instance norms."""


def running_norms(model: nn.Module) -> dict[str, Norm]:
    """The norms that keep running statistics, by path."""
    return {path: m for path, m in model.named_modules() if isinstance(m, Norm) and m.running_mean is not None}


def norm_buffers(model: nn.Module) -> tuple[str, ...]:
    """Names of all their buffers, ``num_batches_tracked`` included."""
    return tuple(f"{path}.{name}".lstrip(".") for path, m in running_norms(model).items() for name in m._buffers)


def frozen_norms(model: nn.Module) -> dict[str, Norm]:
    """The norms whose running statistics training leaves alone, by path.

    Besides frozen modules, norms with ``momentum=0``, and those whose ``track_running_stats`` was set to false though
    they have statistics.
    """
    with modes_restored(model):
        train_as_handed(model)
        return {
            path: norm
            for path, norm in running_norms(model).items()
            if not norm.training or norm.momentum == 0 or not norm.track_running_stats
        }


def statistics_of(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the running means and variances, by the buffers' full names."""
    with torch.inference_mode(False):  # whose tensors could not be changed outside later
        return {
            f"{path}.{name}".lstrip("."): b.detach().clone()
            for path, m in running_norms(model).items()
            for name in ("running_mean", "running_var")
            if (b := m._buffers.get(name)) is not None
        }


@contextlib.contextmanager
def cumulative(model: nn.Module, norms: Iterable[Norm]) -> Iterator[Callable[[], None]]:
    """Inside, norms average their statistics over the batches, from nothing; all other modules evaluate.

    Dropout and the like stay off, since the statistics are those of the network that is served. Modes and momenta are
    restored; the statistics are left as they were measured.

    Args:
        model: Holds the norms.
        norms: Those that are measured; all others keep their statistics and normalise by them.

    Yields:
        What to call before every batch.
    """
    momenta = [(m, m.momentum) for m in norms]
    instance_norms = [m for m, _ in momenta if not isinstance(m, _BatchNorm)]
    batches = itertools.count(1)

    def begin() -> None:
        share = 1 / next(batches)
        for m in instance_norms:  # which take momentum=None for 0
            m.momentum = share

    try:
        with evaluating(model):
            for m, _ in momenta:
                m.training = True
                m.momentum = None  # a cumulative average: every batch weighs the same
                m.reset_running_stats()
            yield begin
    finally:
        for m, momentum in momenta:
            m.momentum = momentum


def measure(
    model: nn.Module,
    batches: Iterable[Any],
    forward: Forward | None = None,
    frozen: Mapping[str, Norm] | None = None,
) -> int:
    """Replace the running statistics by their exact average over batches.

    Args:
        model: Run under no gradient, in place.
        batches: Any iterable; every batch weighs the same.
        forward: How a batch is used, ``forward(model, batch)``; by default
            :func:`~cocktailsdk.utils.nested.outputs_of`.
        frozen: Norms that keep theirs, by path; by default :func:`frozen_norms`.

    Returns:
        The number of batches.

    Raises:
        CocktailError: There were no batches, or the model does not take the first one.
    """
    run = forward or outputs_of
    frozen = frozen_norms(model) if frozen is None else frozen
    n = 0
    measured = [m for path, m in running_norms(model).items() if path not in frozen]
    with cumulative(model, measured) as begin, torch.no_grad():
        for batch in batches:
            begin()
            if n or forward is not None:
                run(model, batch)
            else:
                _run_first(model, batch)
            n += 1
    if n == 0:
        raise CocktailError(
            "recalibration got no batches: the iterable was empty (an iterator that was already used up?); "
            "give a list or a loader"
        )
    return n


def _run_first(model: nn.Module, batch: Any) -> None:
    """The first batch: one that does not fit the model is named."""
    with blamed(
        "the model",
        lambda: f"on the first batch, which is {form_of(batch)}",
        "if the model takes such batches otherwise, give recalibrate(name, batches, forward=lambda model, batch: …)",
        MISFITS,
    ):
        outputs_of(model, batch)
