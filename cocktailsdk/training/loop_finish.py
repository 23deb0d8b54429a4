"""The end of a loop of your own: every network gets its batch-norm statistics and a metric."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..errors import CocktailError, TrainingError
from ..net.subnet_model import SubnetModel
from ..utils.batchnorm import device_of
from ..utils.modes import TrainingModes, modes_kept
from .data.batches import HeldBatches
from .data.loader_state import refuse_spent
from .left_out import weight_sums
from .metrics import MetricFn, accuracy_of, mean_score
from .randomness import forked
from .rescue import rescued_bundle
from .state.provenance import note_training
from .step.distill import Classes, find_classes
from .step.forward import ForwardFn
from .step.nan_guard import not_finite
from .step.precision import without_autocast

__all__ = ["finish_loop"]


def finish_loop(
    net: SubnetModel,
    names: Sequence[str],
    train_loader: Iterable[Any],
    val_loader: Iterable[Any] | None,
    *,
    forward: ForwardFn,
    modes: TrainingModes,
    metric: MetricFn | None,
    classes: Classes | None,
    recalibration_batches: int,
    seed: int,
    configuration: Mapping[str, Any],
    steps: int,
    first_sums: Tensor | None,
) -> None:
    """What ``CoLoop.finish`` does; see there for arguments that are not here.

    Args:
        net: The trained networks.
        names: Of the networks, the dense one first.
        train_loader: As there.
        val_loader: As there.
        forward: How a batch is used.
        modes: In which modules trained.
        metric: As there.
        classes: Where the steps saw class logits.
        recalibration_batches: As there.
        seed: The loop's.
        configuration: The loop's, for the bundle.
        steps: Optimizer steps done.
        first_sums: The weights' sums before the first of them, if it was seen.

    Raises:
        TrainingError: As there.
    """
    _check_trained(net, steps, first_sums)
    refuse_spent(val_loader, "val_loader")
    device = device_of(net.model)
    with _restored_on_failure(net), without_autocast(device), forked(), modes_kept(net.model):
        modes.apply()
        batches = HeldBatches(train_loader, (seed, "recalibration"), device, recalibration_batches)
        held_out = None if val_loader is None else HeldBatches(val_loader, (seed, "held out"), device)
        if held_out is not None and metric is None:
            metric = _accuracy(net, held_out, forward, classes)
        net.statistics.clear()
        net.metrics.clear()
        for i, name in enumerate(names):
            net.recalibrate(name, batches, lambda model, batch: forward(model, batch)[0])
            if held_out is not None and metric is not None:
                with net.using(name):
                    score = mean_score(net.model, held_out, forward, metric, check=not i)
                net.metrics[name] = score.number
        note_training(net, configuration, train_loader)


@contextmanager
def _restored_on_failure(net: SubnetModel) -> Iterator[None]:
    """Put statistics and metrics back where something raises, and save what was trained."""
    statistics, metrics = dict(net.statistics), dict(net.metrics)
    try:
        yield
    except Exception as error:
        net.statistics.clear()
        net.statistics.update(statistics)
        net.metrics.clear()
        net.metrics.update(metrics)
        what = error if isinstance(error, CocktailError) else f"{type(error).__name__}: {error}"
        saved = rescued_bundle(net, "call finish() again, or ")
        where = saved or "The trained weights and masks are in the net: call finish() again"
        raise TrainingError(f"finish() failed ({' '.join(str(what).split())}). {where}") from error


def _check_trained(net: SubnetModel, steps: int, first_sums: Tensor | None) -> None:
    """See that the optimizer steps did something, and nothing that makes weights worthless."""
    if first_sums is not None and torch.equal(first_sums, weight_sums(net.model)):
        raise TrainingError(
            f"no weight changed in {steps} steps, so nothing was trained: was every optimizer step left out "
            "(a GradScaler, a loss that is not finite), or is the optimizer not over net.parameters()?"
        )
    if wrong := not_finite(net.model):
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise TrainingError(
            f"{', '.join(wrong[:3])}{more} became infinite or no number in training: lower the learning rate, or "
            "look for values in the data that are not finite"
        )


def _accuracy(net: SubnetModel, held_out: HeldBatches, forward: ForwardFn, classes: Classes | None) -> MetricFn:
    """Accuracy, where outputs are class logits along axis 1, as the steps or a held-out batch show."""
    if classes is None:
        with modes_kept(net.model), torch.no_grad():
            net.model.eval()
            for batch in itertools.islice(held_out, 1):
                classes = find_classes(*forward(net.model, batch), None)
    if classes is None or classes.axis != 1:
        raise TrainingError(
            "finish() measures classifications by itself, and nothing else: give metric, or no val_loader"
        )
    return accuracy_of(classes)
