"""A run's losses and metrics as TensorBoard scalars, while it trains (extra ``tensorboard``)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from os import PathLike, fspath
from types import TracebackType
from typing import Any, Self

from ..errors import TrainingError
from ..training.events import (
    AlphaChosen,
    EpochEnded,
    Event,
    Finished,
    NeedMeasured,
    NetworkFinished,
    RoundEnded,
    TrainingStarted,
)
from ..utils.optional import check_installed
from .need import needs

__all__ = ["TensorBoard"]


class TensorBoard:
    """A callback for :class:`~cocktailsdk.CoTrainer` that writes scalars.

    ``loss/NETWORK``, ``learning_rate`` and ``steps_per_second`` are written by epoch, counted over the whole run;
    ``held_out/NETWORK`` by round, that of the finished bundle one after the last; ``alpha`` and ``held_out_mean`` by
    the round merged in. A recipe that measures need adds ``need/NETWORK`` (held-out loss above that of the weights that
    the run started from) and ``passes/NETWORK``, by optimizer step. A run that goes on after a stop writes on; what
    both calls wrote is the same. Of several processes the main one alone writes.

    Args:
        folder: Where the event files go: ``tensorboard --logdir FOLDER`` shows them.

    Raises:
        TrainingError: TensorBoard is not installed.

    Example:
        ```py
        from cocktailsdk.report.tensorboard import TensorBoard

        with TensorBoard("runs/mine/tensorboard") as board:
            cocktail.CoTrainer(net, loader, loss_fn, out_dir="runs/mine", callbacks=[board]).fit()
        ```
    """

    def __init__(self, folder: str | PathLike[str]) -> None:
        check_installed("tensorboard", purpose="writing TensorBoard scalars", error=TrainingError)
        from torch.utils.tensorboard import SummaryWriter

        self._make = partial(SummaryWriter, fspath(folder))
        self._writer: Any = None  # made where there is something to write
        self._first = self._epochs = self._rounds = 0

    def __call__(self, event: Event) -> None:
        """Write what an event says."""
        writer = self._writer = self._writer or self._make()
        match event:
            case TrainingStarted():
                self._first, self._epochs, self._rounds = event.first_round, event.epochs, event.rounds
            case EpochEnded():
                at = (event.round - self._first) * self._epochs + event.epoch + 1
                _scalars(writer, "loss", event.losses, at)
                writer.add_scalar("learning_rate", event.learning_rate, at)
                writer.add_scalar("steps_per_second", event.steps_per_second, at)
            case NeedMeasured():
                _scalars(writer, "need", needs(event.losses, event.reference), event.step)
                _scalars(writer, "passes", event.passes, event.step)
            case RoundEnded():
                _scalars(writer, "held_out", event.metrics, event.round)
                writer.flush()
            case AlphaChosen():
                writer.add_scalar("alpha", event.alpha, event.round)
                writer.add_scalar("held_out_mean", event.metric, event.round)
            case NetworkFinished():
                if event.metric is not None:
                    _scalars(writer, "held_out", {event.name: event.metric}, self._rounds + 1)
            case Finished():
                writer.flush()

    def __enter__(self) -> Self:
        """The callback."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Close the file."""
        self.close()

    def close(self) -> None:
        """Write what is left, and close the file."""
        if self._writer is not None:
            self._writer.close()


def _scalars(writer: Any, kind: str, values: Mapping[str, float], at: int) -> None:
    for name, value in values.items():
        writer.add_scalar(f"{kind}/{name}", value, at)
