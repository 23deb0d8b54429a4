"""Batch-norm statistics: found, and recalibrated for the network that is active."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .errors import CocktailError
from .utils.nested import outputs_of
from .utils.nested import to_device as to_device

Forward = Callable[[nn.Module, Any], Any]


def batch_norms(model: nn.Module) -> dict[str, _BatchNorm]:
    """The modules that keep running statistics, by path."""
    return {path: m for path, m in model.named_modules() if isinstance(m, _BatchNorm) and m.running_mean is not None}


def batch_norm_buffers(model: nn.Module) -> tuple[str, ...]:
    """Names of all their buffers, ``num_batches_tracked`` included."""
    return tuple(f"{path}.{name}".lstrip(".") for path, m in batch_norms(model).items() for name in m._buffers)


def statistics_of(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the running means and variances, by the buffers' full names."""
    with torch.inference_mode(False):  # whose tensors could not be changed outside later
        return {
            f"{path}.{name}".lstrip("."): b.detach().clone()
            for path, m in batch_norms(model).items()
            for name in ("running_mean", "running_var")
            if (b := m._buffers.get(name)) is not None
        }


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first tensor lies."""
    first = next(itertools.chain(model.parameters(), model.buffers()), None)
    return first.device if first is not None else torch.device("cpu")


@contextlib.contextmanager
def cumulative(model: nn.Module) -> Iterator[None]:
    """Inside, batch norms average their statistics over the batches, from nothing; all other modules evaluate.

    Dropout and the like stay off, since the statistics are those of the network that is served. Modes and momenta are
    restored; the statistics are left as they were measured.
    """
    norms = batch_norms(model)
    modes = [(m, m.training) for m in model.modules()]
    momenta = [(m, m.momentum) for m in norms.values()]
    try:
        model.eval()
        for m in norms.values():
            m.train()
            m.momentum = None  # a cumulative average: every batch weighs the same
            m.reset_running_stats()
        yield
    finally:
        for m, momentum in momenta:
            m.momentum = momentum
        for module, training in modes:
            module.training = training


def measure(model: nn.Module, batches: Iterable[Any], forward: Forward | None = None) -> int:
    """Replace the running statistics by their exact average over batches.

    Args:
        model: Run under no gradient, in place.
        batches: Any iterable; every batch weighs the same.
        forward: How a batch is used, ``forward(model, batch)``; by default
            :func:`~cocktailsdk.utils.nested.outputs_of`.

    Returns:
        The number of batches.

    Raises:
        CocktailError: There were no batches.
    """
    run = forward or outputs_of
    n = 0
    with cumulative(model), torch.no_grad():
        for batch in batches:
            run(model, batch)
            n += 1
    if n == 0:
        raise CocktailError(
            "recalibration got no batches: the iterable was empty (an iterator that was already used up?); "
            "give a list or a loader"
        )
    return n
