"""Where a run stands, gathered from its events."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from ..training import events

__all__ = ["Progress"]


@dataclass
class Progress:
    """What the events so far say.

    Attributes:
        clock: Seconds, monotonic.
        phase: ``"starting"``, ``"training"``, ``"merging"``, ``"refitting"``, ``"measuring"`` or ``"done"``.
        rounds: Number of the last round.
        first_round: Number of the first.
        round: The round that trains or is merged in.
        epochs: Epochs of the round.
        epoch: Epochs of the round that are over.
        done_steps: Optimizer steps done.
        total_steps: Of how many.
        rate: Steps per second.
        judged: Of merging, candidates judged; of refitting heads and of measuring, networks done.
        to_judge: Of how many.
        metrics: Latest held-out metric by network.
        losses: Latest mean training loss by network.
        alphas: The share chosen by round.
        need: The last measurement of who needs passes most, if the recipe measures it.
    """

    clock: Callable[[], float] = time.monotonic
    phase: str = "starting"
    rounds: int = 0
    first_round: int = 0
    round: int = 0
    epochs: int = 0
    epoch: int = 0
    done_steps: int = 0
    total_steps: int = 0
    rate: float = 0.0
    judged: int = 0
    to_judge: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    losses: dict[str, float] = field(default_factory=dict)
    alphas: dict[int, float] = field(default_factory=dict)
    need: events.NeedMeasured | None = None
    _began: float = 0.0
    _phase_began: float = 0.0

    def __post_init__(self) -> None:
        self._began = self._phase_began = self.clock()

    def take(self, event: events.Event) -> None:
        """Learn from an event."""
        match event:
            case events.TrainingStarted():
                self._enter("training")
                self.rounds, self.epochs = event.rounds, event.epochs
                self.first_round = self.round = event.first_round
                self.done_steps, self.total_steps = event.done_steps, event.total_steps
            case events.RoundStarted():
                self._enter("training")
                self.round, self.epochs, self.epoch = event.round, event.epochs, 0
            case events.NeedMeasured():
                self.need = event
            case events.StepDone():
                self.round, self.epoch, self.rate = event.round, event.epoch, event.steps_per_second
                self.done_steps, self.total_steps = event.done_steps, event.total_steps
            case events.EpochEnded():
                self.round, self.epoch, self.rate = event.round, event.epoch + 1, event.steps_per_second
                self.losses.update(event.losses)
            case events.RoundEnded():
                self.metrics.update(event.metrics)
            case events.MergeStarted():
                self._enter("merging")
                self.judged, self.to_judge = 0, event.candidates
            case events.MergeProgress():
                if self.phase != "merging":
                    self._enter("merging")
                self.round, self.judged, self.to_judge = event.round, event.judged, event.total
            case events.AlphaChosen():
                self.alphas[event.round] = event.alpha
            case events.HeadRefitted():
                if self.phase != "refitting":
                    self._enter("refitting")
                self.judged, self.to_judge = event.done, event.total
            case events.NetworkFinished():
                if self.phase != "measuring":
                    self._enter("measuring")
                self.judged, self.to_judge = event.done, event.total
                if event.metric is not None:
                    self.metrics[event.name] = event.metric
            case events.Finished():
                self._enter("done")
                self.metrics.update(event.metrics)
            case events.Saved():
                pass

    def _enter(self, phase: str) -> None:
        self.phase, self._phase_began = phase, self.clock()

    @property
    def elapsed(self) -> float:
        """Seconds since the view began."""
        return self.clock() - self._began

    @property
    def share(self) -> float:
        """Share of the phase that is done."""
        if self.phase == "training":
            return self.done_steps / self.total_steps if self.total_steps else 0.0
        if self.phase in ("merging", "refitting", "measuring"):
            return self.judged / self.to_judge if self.to_judge else 0.0
        return 1.0 if self.phase == "done" else 0.0

    @property
    def remaining(self) -> float | None:
        """Seconds that the phase still takes, as far as can be told; merging is not part of training's."""
        if self.phase == "training":
            return (self.total_steps - self.done_steps) / self.rate if self.rate > 0 else None
        if self.phase in ("merging", "refitting", "measuring") and self.judged:
            return (self.clock() - self._phase_began) * (self.to_judge - self.judged) / self.judged
        return None

    def headline(self) -> str:
        """Phase, round, epoch, in words."""
        match self.phase:
            case "training":
                now = min(self.epoch + 1, self.epochs) if self.epochs else 0
                epochs = f"epoch {now} of {self.epochs}"
                if self.round > self.rounds:
                    return f"finishing, {epochs}"
                alone = self.rounds == self.first_round
                return epochs if alone else f"round {self.round} of {self.rounds}, {epochs}"
            case "merging":
                return f"merging round {self.round} of {self.rounds}, {self.judged} of {self.to_judge} judged"
            case "refitting":
                return f"classifier heads, {self.judged} of {self.to_judge} networks"
            case "measuring":
                return f"statistics and metrics, {self.judged} of {self.to_judge} networks"
        return self.phase
