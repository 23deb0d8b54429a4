"""The end of a loop of your own: every network gets its batch-norm statistics and a metric."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ..errors import CocktailError, TrainingError
from ..net.subnet_model import SubnetModel
from ..utils.losses import ForwardFn
from ..utils.modes import evaluating
from .data.batches import CachedBatches
from .ending import rescued_bundle
from .left_out import first_few, weight_sums
from .metrics import MetricFn, accuracy_of
from .step.distill import Classes, find_classes
from .step.nan_guard import not_finite

__all__ = ["accuracy_metric", "check_trained", "restored_on_failure"]


@contextmanager
def restored_on_failure(net: SubnetModel) -> Iterator[None]:
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


def check_trained(net: SubnetModel, steps: int, first_sums: Tensor | None) -> None:
    """See that the optimizer steps changed weights, and that all are finite.

    Args:
        net: The networks.
        steps: Optimizer steps done.
        first_sums: The weights' sums before the first of them, if it was seen.

    Raises:
        TrainingError: They did not, or are not.
    """
    if first_sums is not None and torch.equal(first_sums, weight_sums(net.model)):
        raise TrainingError(
            f"no weight changed in {steps} steps, so nothing was trained: was every optimizer step left out "
            "(a GradScaler, a loss that is not finite), or is the optimizer not over net.parameters()?"
        )
    if wrong := not_finite(net.model):
        raise TrainingError(
            f"{first_few(wrong)} became infinite or no number in training: lower the learning rate, or "
            "look for values in the data that are not finite"
        )


def accuracy_metric(net: SubnetModel, held_out: CachedBatches, forward: ForwardFn, classes: Classes | None) -> MetricFn:
    """Accuracy, where outputs are class logits along axis 1, as the steps or a held-out batch show.

    Raises:
        TrainingError: They are not.
    """
    if classes is None:
        with evaluating(net.model), torch.no_grad():
            for batch in itertools.islice(held_out, 1):
                classes = find_classes(*forward(net.model, batch), None)
    if classes is None or classes.axis != 1:
        raise TrainingError(
            "finish() measures classifications by itself, and nothing else: give metric, or no val_loader"
        )
    return accuracy_of(classes)
