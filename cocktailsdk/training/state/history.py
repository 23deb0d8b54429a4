"""What a run has done so far: where it stands and what came out of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

__all__ = ["History", "Position", "RoundHistory"]


@dataclass
class RoundHistory:
    """A round's record.

    Attributes:
        round: Its number.
        networks: The subnets that trained in it with the dense network.
        losses: By epoch, the mean training loss of each network.
        learning_rates: By epoch, the rate at its end.
        metrics: Held-out metric by network at the round's end, statistics recalibrated.
        made: By network, the optimizer steps that trained it; ``None`` for a round of release 0.1.
        left_out: By network, those that were left out since something was not finite.
    """

    round: int
    networks: list[str]
    losses: list[dict[str, float]] = field(default_factory=list)
    learning_rates: list[float] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    made: dict[str, int] | None = None
    left_out: dict[str, int] = field(default_factory=dict)


@dataclass
class History:
    """A run's record.

    Attributes:
        rounds: One for every round that has begun.
        alphas: The interpolation coefficients chosen when rounds 2, 3, … were merged in.
        shares: Coefficients by layer, if layers have their own; empty where ``alphas`` holds for all.
        merged: The mean held-out metric at each of these coefficients.
        curves: By round what merging found at every α: ``{"round": 2, "points": [{"alpha": 0.9, "metric": 0.91},
            {"alpha": 0.8, "bound": 0.9}, …]}``; where an α was given up, ``"bound"`` is how good the mean metric
            could still have been.
        judged: Recalibrated networks that merging evaluated, on all held-out batches or some.
        judged_batches: Held-out batches that they were evaluated on, where some could suffice.
        reused: Networks not judged because the round before had judged them, at α = 1.
        to_judge: Networks that the full search would recalibrate and evaluate. What is neither judged nor reused could
            not matter: the bound said so before they were looked at.
        to_judge_batches: On how many batches, where some could suffice.
        steps: Optimizer steps done.
        passes: Forward and backward passes of them: as many, but where a step trains several networks.
        skipped: Steps left out since their loss or gradients were not finite; ``steps`` does not count them.
        measured: With a recipe that shares passes by need, one entry for each measurement: ``{"step": 40, "losses":
            {…}, "accuracies": {…}, "shares": {…}}``, with the held-out loss of each network, its accuracy if that is
            the run's metric, and its share of the passes after the measurement.
        before: The dense network's held-out metric with the weights that the run started from, if it started from
            trained weights.
        weights: By network the stored weights that it has for its own; the others share the net's.
        seconds: Time spent, over all calls.
    """

    rounds: list[RoundHistory] = field(default_factory=list)
    alphas: list[float] = field(default_factory=list)
    shares: list[dict[str, float]] = field(default_factory=list)
    merged: list[float] = field(default_factory=list)
    curves: list[dict[str, Any]] = field(default_factory=list)
    judged: int = 0
    judged_batches: int = 0
    reused: int = 0
    to_judge: int = 0
    to_judge_batches: int = 0
    steps: int = 0
    passes: int = 0
    skipped: int = 0
    measured: list[dict[str, Any]] = field(default_factory=list)
    before: dict[str, float] = field(default_factory=dict)
    weights: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> History:
        """The inverse of :meth:`to_dict`."""
        return cls(**{**data, "rounds": [RoundHistory(**r) for r in data["rounds"]]})


@dataclass
class Position:
    """Where a run stands.

    Attributes:
        phase: What it is doing.
        round: The round.
        entered: Whether the round's masks are made and its weights rewound.
        epoch: Epoch in the round.
        step: Steps of the epoch that are done; in the phases ``"refit"`` and ``"finish"``, networks that are done.
    """

    phase: Literal["train", "merge", "finishing", "refit", "finish", "done"]
    round: int
    entered: bool = False
    epoch: int = 0
    step: int = 0
