"""Passes of the calibration data through the model: inputs of weights, and gradients."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..errors import PatternError
from ..graph import Weight
from ..patterns.scores.base import Observed
from ..patterns.scores.matrices import as_matrices, parts_of
from ..utils.devices import device_of
from ..utils.losses import ForwardFn, LossFn, loss_of
from ..utils.modes import evaluating
from ..utils.nested import default_forward, outputs_of, to_device
from .accumulate import InputSums
from .data import CalibrationData
from .observe import InputObserver

__all__ = ["gram_groups", "observe_gradients", "observe_inputs", "run_batches"]

log = logging.getLogger(__name__)

GRAM_BYTES = 2 << 30
"""Products of inputs that are summed in one pass take at most this much; where all together are larger, the data is
passed through several times."""

PROGRESS_SECONDS = 10.0


def run_batches(
    model: nn.Module, data: CalibrationData, forward_fn: ForwardFn | None, what: str
) -> Iterator[tuple[Any, Any]]:
    """Run a model on all batches: outputs and targets, one by one. Progress is logged."""
    device, last = device_of(model), time.monotonic()
    for i, batch in enumerate(data.batches):
        if time.monotonic() - last > PROGRESS_SECONDS:
            last = time.monotonic()
            log.info("%s: batch %d of %d", what, i + 1, len(data.batches))
        if forward_fn is not None:
            yield forward_fn(model, to_device(batch, device))
        else:
            yield outputs_of(model, batch), None


def gram_groups(weights: Sequence[Weight], limit: int = GRAM_BYTES) -> list[list[Weight]]:
    """Weights in runs whose products of inputs fit into so many bytes together; one at least in each."""
    out: list[list[Weight]] = []
    used = limit + 1
    for weight in weights:
        parts, _, features = as_matrices(weight, torch.empty(weight.shape, device="meta")).shape
        size = parts * features**2 * 4
        if used + size > limit:
            out.append([])
            used = 0
        out[-1].append(weight)
        used += size
    return out


def observe_inputs(
    model: nn.Module,
    weights: Iterable[Weight],
    data: CalibrationData,
    forward_fn: ForwardFn | None = None,
    *,
    gram: bool = False,
) -> Iterator[tuple[Weight, Observed | None]]:
    """Pass the data through the model and see what weights are multiplied with.

    Args:
        model: Run in evaluation mode, without gradients; it is left as it was.
        weights: The weights, in order of execution.
        data: The data.
        forward_fn: ``forward_fn(model, batch) -> (output, target)``; by default batches are used as in training.
        gram: Whether products of inputs are summed, not only squares.

    Yields:
        Each weight and what was observed of it, ``None`` if it was not used.
    """
    weights = list(weights)
    groups = gram_groups(weights) if gram else [weights]
    for k, group in enumerate(groups):
        sums = InputSums([w.name for w in group] if gram else ())
        what = "calibrating" if len(groups) == 1 else f"calibrating, pass {k + 1} of {len(groups)}"
        with evaluating(model), torch.no_grad(), parametrize.cached():
            observer = InputObserver(group, weight_tensors(model, group), sums)
            with observer:
                for _ in run_batches(model, data, forward_fn, what):
                    pass
        for weight in group:
            yield weight, sums.of(weight, parts_of(weight))


def weight_tensors(model: nn.Module, weights: Iterable[Weight]) -> dict[str, Tensor]:
    """The tensors that the model multiplies with. Inside of ``parametrize.cached()`` a parametrized weight is one."""
    parameters: Mapping[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    out = {}
    for weight in weights:
        module = model.get_submodule(weight.module)
        short = weight.name.removeprefix(f"{weight.module}.").removeprefix("parametrizations.").partition(".")[0]
        if parametrize.is_parametrized(module, short):
            out[weight.name] = getattr(module, short)
        else:
            out[weight.name] = parameters[weight.name]
    return out


@contextlib.contextmanager
def _require_grad(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    before = [(p, p.requires_grad) for p in parameters]
    try:
        for p, _ in before:
            p.requires_grad_(True)
        yield
    finally:
        for p, wanted in before:
            p.requires_grad_(wanted)


def observe_gradients(
    model: nn.Module,
    weights: Iterable[Weight],
    data: CalibrationData,
    loss_fn: LossFn | None,
    forward_fn: ForwardFn | None = None,
) -> Iterator[tuple[Weight, Observed]]:
    """Pass the data through the model and back: the mean over batches of gradients, and of their squares.

    Args:
        model: Run in evaluation mode; it is left as it was.
        weights: The weights.
        data: The data.
        loss_fn: ``loss_fn(output, target)``; ``None`` for the loss that the model's output holds.
        forward_fn: As in :func:`observe_inputs`.

    Raises:
        PatternError: A gradient is infinite or NaN.
        TrainingError: There is no loss.
    """
    weights = list(weights)
    by_name = dict(model.named_parameters(remove_duplicate=False))
    parameters = [by_name[w.name] for w in weights]
    means = [torch.zeros_like(p, dtype=torch.float32) for p in parameters]
    squares = [torch.zeros_like(m) for m in means]
    forward, share = forward_fn or default_forward, 1 / len(data.batches)
    with evaluating(model), _require_grad(parameters), torch.enable_grad():
        for output, target in run_batches(model, data, forward, "calibrating"):
            loss = loss_of(output, target, loss_fn)
            for i, g in enumerate(torch.autograd.grad(loss, parameters, allow_unused=True)):
                if g is not None:
                    means[i].add_(g, alpha=share)
                    squares[i].addcmul_(g.float(), g.float(), value=share)
    for weight, mean, square in zip(weights, means, squares, strict=True):
        if not bool(square.isfinite().all()):
            raise PatternError(f"calibration: gradients of {weight.name!r} are infinite or NaN")
        yield weight, Observed(gradient=mean, gradient_squares=square)
