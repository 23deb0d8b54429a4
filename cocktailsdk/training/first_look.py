"""What can be seen on a first batch: whether this is a classification, and so how to distil and what to measure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ..errors import TrainingError
from ..modes import train_as_handed
from .distill import Classes, find_classes, no_soft_loss, untouched_buffers
from .forward import loss_of
from .metrics import MetricFn, accuracy
from .options import Options
from .randomness import seed_everything
from .sharing import inputs_of

__all__ = ["choose_metric", "look"]


def look(model: nn.Module, batches: Iterable[Any], options: Options) -> Classes | None:
    """Run the model once, in train mode and without a trace, and see where its output holds class logits.

    Args:
        model: As it stands.
        batches: On its device.
        options: Of the run.

    Raises:
        TrainingError: Without batches, where the loader raises, without a loss, or where distillation needs a
            ``distill_fn``.
    """
    try:
        batch = next(iter(batches), None)
    except Exception as error:
        raise TrainingError(f"the loader raised {type(error).__name__} ({error}) for its first batch") from error
    if batch is None:
        raise TrainingError("the loader gave no batches")
    seed_everything(options.seed, "first look")
    modes = [(module, module.training) for module in model.modules()]
    train_as_handed(model)
    try:
        with torch.no_grad(), untouched_buffers(model):
            output, target = options.forward_fn(model, inputs_of(batch))
            loss = loss_of(output, target, options.loss_fn)
    finally:
        for module, mode in modes:
            module.training = mode
    classes = find_classes(output, target, loss)
    if options.distillation and options.distill_fn is None and classes is None:
        raise no_soft_loss(options.loss_fn, output)
    return classes


def choose_metric(classes: Classes | None, options: Options) -> MetricFn:
    """The user's metric; else accuracy for classification, or the loss (negative where more is to be better)."""
    if options.metric is not None:
        return options.metric
    if classes is not None and classes.axis == 1:
        return accuracy
    sign = -1 if options.metric_mode == "max" else 1
    return lambda output, target: sign * loss_of(output, target, options.loss_fn)
