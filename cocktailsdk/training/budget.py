"""A budget of epochs or of optimizer steps, divided among rounds and finishing."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import TrainingError

__all__ = [
    "Division",
    "RunLength",
    "divide_epochs",
    "divide_steps",
    "epochs_in",
    "finishing_length",
    "rewind_epoch_of",
    "round_steps",
]


def round_steps(steps: int, rounds: int, finishing: float, *, rewound: int = 0, of: str = "steps") -> list[int]:
    """Steps of each round, and of finishing where there is some; together exactly the budget.

    Args:
        steps: Optimizer steps in all.
        rounds: How many rounds share them in equal parts.
        finishing: Share of them that finishing takes; less where the rounds would not get one step each.
        rewound: Steps that all rounds but the first need not make, since they begin after them.
        of: What the budget's argument is called.

    Raises:
        TrainingError: There are fewer steps than rounds; says how many it takes.
    """
    need = rounds + (finishing > 0) + rewound
    if steps < need:
        fewer = steps - (finishing > 0) - 1
        also = f"{rounds} rounds{' and finishing' * bool(finishing)} need at least one step each"
        after = f", and the first {rewound} more, to the rewind point" if rewound else ""
        rounds_of = "rounds=RoundSettings(count={})" if of == "total_steps" else "rounds={}"  # CoTrainer's, or CoLoop's
        other = f", or {rounds_of.format(fewer)} or fewer" if fewer >= 1 and not rewound else ""
        raise TrainingError(f"{of}={steps} is too small: {also}{after}; give {of}={need} or more{other}")
    last = [max(1, min(round(finishing * steps), steps - need + 1))] if finishing else []
    each, more = divmod(steps - sum(last) + rewound * (rounds - 1), rounds)
    return [each + (k < more) - (rewound if k else 0) for k in range(rounds)] + last


def epochs_in(steps: int, steps_per_epoch: int) -> int:
    """Epochs that steps take; the last one may be a part."""
    return -(-steps // steps_per_epoch)


def finishing_length(each: int, rounds: int, share: float) -> int:
    """Epochs, or steps, that finishing takes to be a share of the whole run, at least one; 0 where the share is.

    Args:
        each: Epochs, or steps, of a round.
        rounds: How many rounds there are.
        share: Finishing's share of the run.
    """
    return max(1, round(each * rounds * share / (1 - share))) if share else 0


def rewind_epoch_of(given: int | None, start: str, epochs: int) -> int:
    """As given, or the paper's 7 of 150; given weights are a rewind point of their own."""
    if start == "pretrained":
        return 0
    return max(round(epochs * 7 / 150), min(epochs, 1)) if given is None else given


@dataclass(frozen=True)
class RunLength:
    """How long a run trains, as one of two numbers.

    Attributes:
        epochs: Of every round; may be a fraction.
        total_steps: Optimizer steps of the whole run. ``None`` if ``epochs`` says how long.
    """

    epochs: float = 1
    total_steps: int | None = None


@dataclass(frozen=True)
class Division:
    """How a run's training is divided.

    Attributes:
        epochs: Of the longest round; the last may be a part of one.
        finishing_epochs: Likewise of finishing; 0 for none.
        rewind_epoch: After how many epochs of the dense round the rewind point is.
        budget: Optimizer steps of every round and of finishing; empty where all have whole epochs.
    """

    epochs: int
    finishing_epochs: int
    rewind_epoch: int
    budget: tuple[int, ...] = ()


def divide_epochs(
    epochs: float,
    rounds: int,
    finishing: float,
    steps_per_epoch: int,
    *,
    rewind_epoch: int | None,
    start: str,
    rewound: bool,
) -> Division:
    """Give every round so many epochs, or the nearest whole number of optimizer steps, at least one.

    Args:
        epochs: Of every round; may be a fraction.
        rounds: How many rounds there are, the dense one included.
        finishing: Share of the run that finishing takes.
        steps_per_epoch: Optimizer steps of an epoch.
        rewind_epoch: As the user gave it.
        start: Where the run's weights come from.
        rewound: Whether rounds after the dense one begin at the rewind point in their epochs too.
    """
    steps = max(1, round(epochs * steps_per_epoch))
    whole, rest = divmod(steps, steps_per_epoch)
    if not rest:
        rewind = rewind_epoch_of(rewind_epoch, start, whole)
        return Division(whole, finishing_length(whole, rounds, finishing), rewind)
    longest = epochs_in(steps, steps_per_epoch)
    rewind = rewind_epoch_of(rewind_epoch, start, longest)
    if rewound and rewind_epoch is None:  # the part of an epoch is left to the rounds after the dense one
        rewind = min(rewind, whole)
    last = finishing_length(steps, rounds, finishing)
    later = steps - (rewind * steps_per_epoch if rewound else 0)
    budget = (steps, *[later] * (rounds - 1), *([last] if finishing else []))
    return Division(longest, epochs_in(last, steps_per_epoch), rewind, budget)


def divide_steps(
    total_steps: int,
    rounds: int,
    finishing: float,
    steps_per_epoch: int,
    *,
    rewind_epoch: int | None,
    start: str,
    rewound: bool,
) -> Division:
    """Divide a budget of steps, so that exactly so many are made.

    Args:
        total_steps: The budget.
        rounds: How many rounds there are, the dense one included.
        finishing: Share of the steps that finishing takes.
        steps_per_epoch: Optimizer steps of an epoch.
        rewind_epoch: As the user gave it.
        start: Where the run's weights come from.
        rewound: Whether rounds after the dense one begin at the rewind point in their epochs too.

    Raises:
        TrainingError: The budget is too small; says how many steps it takes.
    """
    of = "total_steps"
    steps = round_steps(total_steps, rounds, finishing, of=of)
    rewind = rewind_epoch_of(rewind_epoch, start, epochs_in(steps[0], steps_per_epoch))
    if rewound and rewind:
        if rewind_epoch is None:  # a rewind point that the budget does not reach would leave the rounds nothing
            rewind = min(rewind, max(0, (total_steps - rounds - (finishing > 0)) // steps_per_epoch))
        steps = round_steps(total_steps, rounds, finishing, rewound=rewind * steps_per_epoch, of=of)
    last = steps[rounds] if finishing else 0
    whole = not any(n % steps_per_epoch for n in steps)
    alike = len({n + (rewind * steps_per_epoch if rewound and k else 0) for k, n in enumerate(steps[:rounds])}) == 1
    budget = () if whole and alike else tuple(steps)
    return Division(epochs_in(steps[0], steps_per_epoch), epochs_in(last, steps_per_epoch), rewind, budget)
