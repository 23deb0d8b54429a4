"""What a training run tells those who watch it.

Every callback given to :class:`~cocktailsdk.CoTrainer` is called with each event, in order. Events are plain data,
made only at moments at which the run could be stopped and resumed: a callback that raises ``KeyboardInterrupt``
stops the run there, its state saved.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

__all__ = [
    "AlphaChosen",
    "Callback",
    "EpochEnded",
    "Event",
    "Finished",
    "HeadRefitted",
    "MergeProgress",
    "MergeStarted",
    "NeedMeasured",
    "NetworkFinished",
    "RoundEnded",
    "RoundStarted",
    "Saved",
    "StepDone",
    "StepSkipped",
    "TrainingStarted",
]


@dataclass(frozen=True)
class Event:
    """Base class of all events."""


@dataclass(frozen=True)
class TrainingStarted(Event):
    """The run begins, or goes on.

    Attributes:
        rounds: Number of the last round (round 0 trains the dense network alone).
        first_round: 0, or 1 where given weights are the rewind point.
        epochs: Epochs in each round.
        steps_per_epoch: Mini-batches in each epoch.
        total_steps: Optimizer steps of all rounds together, finishing included.
        done_steps: Those already done in an earlier call.
        resumed: Whether a saved state was found.
    """

    rounds: int
    first_round: int
    epochs: int
    steps_per_epoch: int
    total_steps: int
    done_steps: int
    resumed: bool


@dataclass(frozen=True)
class RoundStarted(Event):
    """A round begins, its masks made and its weights rewound.

    Attributes:
        round: Its number; 0 is the dense round, the one after the last is finishing.
        networks: The subnets that share its steps with the dense network.
        epochs: Its epochs.
    """

    round: int
    networks: tuple[str, ...]
    epochs: int


@dataclass(frozen=True)
class NeedMeasured(Event):
    """All networks were measured on the same held-out examples, and the next passes are shared anew.

    Attributes:
        round: Number of the round.
        step: Steps done in the round.
        losses: Held-out loss by network.
        shares: By network, its share of the next passes.
        passes: By network, the passes that it had so far.
        reference: Loss of the dense network at the first measurement, with the weights that the run started from. What
            a network's loss exceeds it by is its need.
    """

    round: int
    step: int
    losses: Mapping[str, float]
    shares: Mapping[str, float]
    passes: Mapping[str, int]
    reference: float


@dataclass(frozen=True)
class StepDone(Event):
    """An optimizer step was made. Throttled: at most one every ``event_seconds``.

    Attributes:
        round: Number of the round.
        epoch: Epoch in the round, from 0.
        step: Steps done in this epoch.
        done_steps: Steps done in the whole run.
        total_steps: Steps of the whole run.
        steps_per_second: Over this round, as far as this call has run it.
        network: The network that was trained.
    """

    round: int
    epoch: int
    step: int
    done_steps: int
    total_steps: int
    steps_per_second: float
    network: str


@dataclass(frozen=True)
class StepSkipped(Event):
    """A step was left out, since its loss or its gradients were not finite (``on_nan="skip"``).

    Attributes:
        round: Number of the round.
        epoch: Epoch in the round, from 0.
        step: Step in the epoch, from 0.
        batch: Index of its batch in the pass over the loader, from 0.
        network: The network whose loss it was, or the first that the step trained.
        loss: Its loss.
    """

    round: int
    epoch: int
    step: int
    batch: int
    network: str
    loss: float


@dataclass(frozen=True)
class EpochEnded(Event):
    """An epoch is over.

    Attributes:
        round: Number of the round.
        epoch: Epoch in the round, from 0.
        losses: Mean training loss by network, over the steps it had.
        learning_rate: Of the first parameter group, as it now stands.
        steps_per_second: Over this round, as far as this call has run it.
    """

    round: int
    epoch: int
    losses: Mapping[str, float]
    learning_rate: float
    steps_per_second: float


@dataclass(frozen=True)
class RoundEnded(Event):
    """A round is over.

    Attributes:
        round: Its number.
        metrics: Held-out metric by network, statistics recalibrated; empty without held-out data.
    """

    round: int
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class MergeStarted(Event):
    """Merging begins.

    Attributes:
        rounds: Number of rounds to merge.
        candidates: Recalibrated networks that the full search would judge.
    """

    rounds: int
    candidates: int


@dataclass(frozen=True)
class MergeProgress(Event):
    """A candidate network was judged. Throttled as :class:`StepDone` is.

    Attributes:
        round: The round whose weights are being merged in.
        alpha: Interpolation coefficient α, the weight of the merged weights in the candidate.
        judged: Networks judged so far, those that a bound made needless included.
        total: Of how many.
    """

    round: int
    alpha: float
    judged: int
    total: int


@dataclass(frozen=True)
class AlphaChosen(Event):
    """A round's weights were merged in.

    Attributes:
        round: The round.
        alpha: The interpolation coefficient α, the weight of what was merged before; 1 rejects the round's weights.
        metric: Mean held-out metric over the subnets of all rounds so far.
    """

    round: int
    alpha: float
    metric: float


@dataclass(frozen=True)
class HeadRefitted(Event):
    """A network's features were collected, and its classifier head fitted to them if each network has its own.

    Attributes:
        name: The network.
        done: Networks done so far.
        total: Of how many.
    """

    name: str
    done: int
    total: int


@dataclass(frozen=True)
class NetworkFinished(Event):
    """A network of the finished bundle has its statistics.

    Attributes:
        name: The network.
        metric: Its held-out metric, ``None`` without held-out data.
        done: Networks finished so far.
        total: Of how many.
    """

    name: str
    metric: float | None
    done: int
    total: int


@dataclass(frozen=True)
class Finished(Event):
    """The run is over, the network holds its result.

    Attributes:
        metrics: Held-out metric by network; empty without held-out data.
        seconds: Time spent, over all calls that took part.
    """

    metrics: Mapping[str, float]
    seconds: float


@dataclass(frozen=True)
class Saved(Event):
    """The run's state was written.

    Attributes:
        path: The file.
        interrupted: Whether because the run was interrupted.
    """

    path: Path
    interrupted: bool


Callback = Callable[[Event], None]
"""What watches a run: any callable that takes an event."""
