"""The task, inferred from the first batches, and whether model, loss and metric fit them.

Whatever does not fit is refused here, before anything is trained.
"""

from __future__ import annotations

import itertools
from collections.abc import Generator, Iterable
from contextlib import closing
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CocktailError, TrainingError
from ..utils.blame import blamed, one_line
from ..utils.losses import loss_of
from ..utils.modes import evaluating, modes_restored, train_as_handed
from ..utils.nested import default_forward, form_of
from .distributed.ranks import Ranks
from .distributed.sharing import inputs_of
from .metrics import HeldOutLoss, MetricFn, NothingScored, accuracy_of, mean_score
from .options import Options
from .randomness import seed_everything
from .step.distill import Classes, check_teacher, find_classes, no_soft_loss, untouched_buffers
from .step.forward import output_tensor

__all__ = ["choose_metric", "infer_task", "try_metric"]

HINT = (
    "if the model takes such batches otherwise, give batches=BatchSettings(forward_fn=...), a function "
    "forward_fn(model, batch) -> (output, target)"
)
MOST_BATCHES = 8
"""So many batches are tried where the first ones say nothing: all their labels are ignored, say."""


def infer_task(model: nn.Module, batches: Iterable[Any], options: Options) -> Classes | None:
    """Run the model once, in train mode and without a trace, and see where its output holds class logits.

    Args:
        model: As it stands.
        batches: On its device. More than the first one are used where all labels of that are ignored.
        options: Of the run.

    Raises:
        TrainingError: Without batches, where the loader, the model or the loss raises for the first batch, without a
            loss, or where distillation needs a ``DistillationSettings.loss_fn`` or cannot take a teacher's output.
    """
    output = classes = None
    with closing(_from_first(batches, "the loader")) as found:
        for batch in itertools.islice(found, MOST_BATCHES):
            output, target, loss = _pass(model, inputs_of(batch), options)
            classes = find_classes(output, target, loss, options.loss_fn)
            if bool(loss.isfinite()) or not isinstance(target, Tensor):
                break
        if options.distillation and options.settings.distillation.loss_fn is None and classes is None:
            raise no_soft_loss(options.loss_fn, output)
        if options.frozen_teacher:
            check_teacher(output, _taught(model, inputs_of(batch), options), options.settings.distillation.loss_fn)
    return classes


def _from_first(batches: Iterable[Any], what: str) -> Generator[Any]:
    """Batches of which the first ones are looked at."""
    try:
        iterator = iter(batches)
        first = next(iterator, None)
    except CocktailError:
        raise
    except Exception as error:
        raise TrainingError(f"{what} raised {type(error).__name__} ({one_line(error)}) for its first batch") from error
    if first is None:
        raise TrainingError(f"{what} gave no batches")
    yield first
    yield from iterator


def _pass(model: nn.Module, batch: Any, options: Options) -> tuple[Any, Any, Tensor]:
    """Output, target and loss of a batch in train mode."""
    seed_everything(options.seed, "first look")
    own = options.forward_fn is default_forward
    with modes_restored(model), torch.no_grad(), untouched_buffers(model):
        train_as_handed(model)
        with blamed(
            "the model" if own else "forward_fn(model, batch)",
            lambda: f"on the first batch, which is {form_of(batch)}",
            HINT if own else "it must return (output, target)",
        ):
            output, target = options.forward_fn(model, batch)
        with blamed(
            "loss_fn(output, target)",
            lambda: (
                f"on the first batch, for an output that is {form_of(output)} and a target that is {form_of(target)}"
            ),
            "give batches=BatchSettings(forward_fn=...), a function forward_fn(model, batch) -> (output, target), if "
            "that is not what it compares",
        ):
            loss = loss_of(output, target, options.loss_fn)
    return output, target, loss


def _taught(model: nn.Module, batch: Any, options: Options) -> Any:
    """A frozen teacher's output for a batch: that of evaluation mode."""
    with (
        evaluating(model),
        torch.no_grad(),
        untouched_buffers(model),
        blamed("the model in evaluation mode", lambda: f"on the first batch, which is {form_of(batch)}", HINT),
    ):
        return options.forward_fn(model, batch)[0]


def try_metric(
    model: nn.Module,
    batches: Iterable[Any],
    options: Options,
    metric: MetricFn,
    ranks: Ranks,
    names: str = "val_loader",
) -> None:
    """Measure the model on the first held-out batch, so that a metric that does not fit is refused at the start.

    Args:
        model: As it stands.
        batches: On its device. More than the first one are used where that gives no scores, or none that is finite.
        options: Of the run.
        metric: The user's, or the one found.
        ranks: The processes.
        names: What the batches come from, for errors.

    Raises:
        TrainingError: Without batches, where the metric raises, returns something else than scores, or only such as are
            not finite although the output is.
    """
    seed_everything(options.seed, "first scores")
    finite = True

    def judged(output: Any, target: Any) -> Tensor:
        nonlocal finite
        logits = output_tensor(output)
        finite = logits is None or bool(logits.isfinite().all())
        with blamed(
            "metric(output, target)",
            lambda: (
                f"on the first batch of {names}, for an output that is {form_of(output)} and a target that is "
                f"{form_of(target)}"
            ),
            "return a tensor with one number for each example",
        ):
            return metric(output, target)

    def forward(model: nn.Module, batch: Any) -> tuple[Any, Any]:
        with blamed("the model", lambda: f"on the first batch of {names}, which is {form_of(batch)}", HINT):
            return options.forward_fn(model, batch)

    own = isinstance(metric, HeldOutLoss) or options.metric is None  # was chosen for the task that was inferred
    empty, bad = 0, 0
    with closing(_from_first(batches, names)) as found:
        for batch in found:
            try:
                score = mean_score(model, [batch], forward, metric if own else judged, ranks, check=not own)
            except NothingScored:
                empty += 1
                continue
            if score.number == score.number or not finite:
                return
            bad += 1
            if bad >= MOST_BATCHES:
                break
    if not bad:
        raise NothingScored(
            f"there is nothing to evaluate on: no label of the {empty} batches of {names} counts, they are all ignored"
        )
    if options.metric is not None:
        raise TrainingError(
            f"metric(output, target) is not finite for each of the first {bad} batches of {names}, although the model's"
            " output is: return one finite number for each example, and none for an example that does not count"
        )


def choose_metric(classes: Classes | None, options: Options) -> MetricFn:
    """The user's metric; else accuracy for classification, or the loss (negative where more is to be better)."""
    if options.metric is not None:
        return options.metric
    if classes is not None and classes.axis == 1:
        return accuracy_of(classes)
    return HeldOutLoss(options.loss_fn, -1 if options.settings.evaluation.metric_mode == "max" else 1, classes)
