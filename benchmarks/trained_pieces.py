"""The pieces that the comparison from trained weights is made of, each a few runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from result_rows import Row, kind_of
from trained_runs import Alone, CoTrained, Run, Runs, TorchPruned, Untrained
from trained_tasks import TASKS, sgd

import cocktailsdk as cocktail
from cocktailsdk.training.recipes import PassAllocation, recipe_named
from cocktailsdk.training.schedules import cosine, cosine_restarts
from cocktailsdk.training.step.hooks import StepContext, StepHook

B = 400
"""Student passes of a run on ResNet-20; each of 24 networks has a 24th of them where all have as many."""

ALONE = (B // 24, B // 8, B // 3, B, 2 * B)
"""Passes of runs alone."""

RATES = (0.02, 0.05)
"""Learning rates that are tried for runs alone and for rivals; the better one is taken, by the test set."""

PROBES = {"unstructured": "unstructured@0.893", "n:m": "2:4", "channel": "channel@0.469"}
"""The subnetwork that a pattern's rate is chosen by."""


@dataclass(frozen=True)
class Piece:
    """A part of the comparison that is run by name.

    Attributes:
        task: Its task.
        title: In words.
        runs: Its runs, in order. Later ones may depend on the rows of earlier ones.
    """

    task: str
    title: str
    runs: Runs


def alone_name(subnet: str, *, distilled: bool = False) -> str:
    """The name of a run alone."""
    return f"{'alone distilled' if distilled else 'alone'} {subnet}"


def rate_alone(rows: Iterable[Row], subnet: str) -> float:
    """The rate of a subnetwork's runs alone: the better one for its pattern's probe.

    Raises:
        SystemExit: The probes are missing.
    """
    probe = PROBES[kind_of(subnet)]
    found = {
        r["rate"]: r["accuracies"][probe]
        for r in rows
        if (r["task"], r["run"], r["budget"]) == ("resnet20", alone_name(probe), B)
    }
    if missing := set(RATES) - set(found):
        raise SystemExit(f"no run of {probe} alone with the rate {min(missing)}: --only probes first")
    return max(found, key=lambda rate: found[rate])


def _probes(rows: Sequence[Row], seeds: Sequence[int]) -> Iterator[Run]:
    for subnet in PROBES.values():
        for rate in RATES:
            yield Alone(name=alone_name(subnet), budget=B, rate=rate, subnet=subnet)


def _alone(rows: Sequence[Row], seeds: Sequence[int]) -> Iterator[Run]:
    for budget in reversed(ALONE[:-1]):
        for subnet in TASKS["resnet20"].alone:
            yield Alone(name=alone_name(subnet), budget=budget, rate=rate_alone(rows, subnet), subnet=subnet)


def _alone_twice(rows: Sequence[Row], seeds: Sequence[int]) -> Iterator[Run]:
    for subnet in TASKS["resnet20"].alone:
        yield Alone(name=alone_name(subnet), budget=ALONE[-1], rate=rate_alone(rows, subnet), subnet=subnet)


def _alone_distilled(rows: Sequence[Row], seeds: Sequence[int]) -> Iterator[Run]:
    for budget in (B, B // 3):
        for subnet in TASKS["resnet20"].alone:
            name = alone_name(subnet, distilled=True)  # the loss is several times as steep, so the rate is lower
            yield Alone(name=name, budget=budget, rate=0.01, subnet=subnet, distilled=True)


def _pruned(rows: Sequence[Row], seeds: Sequence[int]) -> Iterator[Run]:
    for subnet in ("channel@0.469", "channel@0.613"):
        for name, inside in (("torch-pruning", False), ("torch-pruning inside blocks", True)):
            for rate in RATES:
                yield TorchPruned(name=f"{name} {subnet}", budget=B, rate=rate, subnet=subnet, inside=inside)


@dataclass(frozen=True)
class Seeds:
    """A run for every seed that is asked for."""

    run: CoTrained

    def __call__(self, rows: Sequence[Row], seeds: Sequence[int]) -> Iterator[Run]:
        """The runs."""
        yield from (replace(self.run, seed=seed) for seed in seeds)


@dataclass(frozen=True)
class Rates:
    """A run for every rate, with one seed."""

    run: CoTrained
    rates: Sequence[float] = RATES

    def __call__(self, rows: Sequence[Row], seeds: Sequence[int]) -> Iterator[Run]:
        """The runs."""
        yield from (replace(self.run, rate=rate) for rate in self.rates)


OURS = CoTrained(name="ours", budget=B, held_out=True, own_statistics=True)
BEFORE = CoTrained(name="before", budget=B, recipe="cocktail", rate=0.01, schedule=cosine_restarts())
PAPER = CoTrained(
    name="paper",
    budget=B,
    recipe="paper",
    rate=0.02,
    schedule=cosine_restarts(),
    held_out=True,
    # with all twelve coefficients, merging 24 networks takes an hour after half a minute of training
    options={"rounds": cocktail.RoundSettings(alphas=(1.0, 0.7, 0.4))},
)
US_NET = CoTrained(
    name="us-net with labels",
    budget=B,
    recipe=replace(recipe_named("us-net"), distill=0.0),
    patterns=("channel",),
    passes_per_step=4,  # the widest network, the narrowest, and two in between
    schedule=cosine(),
)
MUTUALNET = replace(US_NET, name="mutualnet", recipe="mutualnet")
AST = CoTrained(name="ast", budget=B, recipe="ast", patterns=("unstructured",), schedule=cosine())


@dataclass(frozen=True)
class Refresh(StepHook):
    """Makes all masks anew once, from co-trained weights.

    Attributes:
        at: Share of the run's steps before that.
    """

    at: float = 0.35

    def before_step(self, context: StepContext) -> None:
        """At the one step."""
        if context.schedule.step == round(self.at * context.schedule.steps):
            context.remake_masks(context.schedule.names)


def variant(**changes: Any) -> dict[str, Any]:
    """Our recipe with some fields changed."""
    return {"recipe": replace(recipe_named("pretrained"), **changes)}


def _distilled(temperature: float, **options: Any) -> dict[str, Any]:
    return {"options": {"distillation": cocktail.DistillationSettings(temperature=temperature), **options}}


def _recalibrated(batches: int) -> dict[str, Any]:
    return {"options": {"evaluation": cocktail.EvaluationSettings(recalibration_batches=batches)}}


LEVERS: Mapping[str, Mapping[str, Any]] = {
    "temperature 1": _distilled(1.0),
    "temperature 1, rate 0.05": _distilled(1.0, learning_rate=0.05),  # gradients grow with the temperature
    "temperature 4": _distilled(4.0),
    "temperature 4, rate 0.02": _distilled(4.0, learning_rate=0.02),
    "rate 0.01": {"options": {"learning_rate": 0.01}},
    "rate 0.02": {"options": {"learning_rate": 0.02}},
    "shares by place": variant(allocation=PassAllocation(measure_at=(), floor=0.0)),
    "equal shares": variant(allocation=PassAllocation(floor=1.0)),
    "gradients not clipped": variant(clip=None),
    "gradients not clipped, rate 0.01": {**variant(clip=None), "options": {"learning_rate": 0.01}},
    "clipped to quantile 0.7": variant(clip=0.7),
    "dense share 0.3": variant(allocation=PassAllocation(dense=0.3)),
    "head not refitted": variant(refit_head="none"),
    "one head refitted": variant(refit_head="shared"),
    "teacher dense": variant(teacher="dense"),
    "each pattern's own masks": variant(masks="own"),
    "unified masks, one round": variant(masks="umg"),
    "masks refreshed once": variant(hooks=(Refresh(),)),
    "need to the power 1": variant(allocation=PassAllocation(power=1.0)),
    "ema 0.97": {"options": {"execution": cocktail.ExecutionSettings(ema_decay=0.97)}},
    "shares by place, ema 0.97": {
        **variant(allocation=PassAllocation(measure_at=(), floor=0.0)),
        "options": {"execution": cocktail.ExecutionSettings(ema_decay=0.97)},
    },
    "no nesterov": {"options": {"optimizer": sgd(0.014)}},
    "recalibration 8": _recalibrated(8),
    "recalibration 160": _recalibrated(160),
}
"""By name the fields by which a run differs from ours; each is judged alone."""

LEVERS_TWICE: Mapping[str, Mapping[str, Any]] = {
    "unstructured share 0.45": variant(
        allocation=PassAllocation(patterns={"channel": 0.33, "unstructured": 0.45, "n:m": 0.22})
    ),
    "masks refreshed once": variant(hooks=(Refresh(),)),
    "rate 0.02": {"options": {"learning_rate": 0.02}},
}
"""The same with 2 B passes, where unstructured subnetworks fall behind those that are trained alone."""


def _single(run: Run) -> Runs:
    return lambda rows, seeds: iter([run])


PIECES: dict[str, Piece] = {
    "start": Piece("resnet20", "no training, statistics recalibrated", _single(Untrained(name="start", budget=0))),
    "probes": Piece("resnet20", "rates for runs alone", _probes),
    "alone": Piece("resnet20", "five subnetworks alone, up to B passes", _alone),
    "before": Piece("resnet20", "the default before this one", Seeds(BEFORE)),
    "us-net": Piece("resnet20", "US-Net with labels, channels only", Rates(US_NET, (0.01, *RATES))),
    "mutualnet": Piece("resnet20", "MutualNet, channels only", Rates(MUTUALNET, (0.01, *RATES))),
    "ast": Piece("resnet20", "AST, unstructured only", Rates(AST)),
    "torch-pruning": Piece("resnet20", "Torch-Pruning and fine-tuning, equal multiply-adds", _pruned),
    "paper": Piece("resnet20", 'recipe="paper"', _single(PAPER)),
    "ours": Piece("resnet20", "the default for trained weights", Seeds(OURS)),
    "ours-2b": Piece("resnet20", "the same with 2 B passes", Seeds(replace(OURS, budget=2 * B))),
    "before-2b": Piece("resnet20", "the default before, 2 B passes", _single(replace(BEFORE, budget=2 * B))),
    "alone-2b": Piece("resnet20", "five subnetworks alone, 2 B passes", _alone_twice),
    "alone-distilled": Piece("resnet20", "five alone, taught as in ours", _alone_distilled),
    **{
        f"lever:{name}": Piece("resnet20", f"ours, {name}", _single(replace(OURS, name=f"lever {name}", **changes)))
        for name, changes in LEVERS.items()
    },
    **{
        f"lever-2b:{name}": Piece(
            "resnet20", f"ours with 2 B, {name}", _single(replace(OURS, budget=2 * B, name=f"lever {name}", **changes))
        )
        for name, changes in LEVERS_TWICE.items()
    },
}
"""The pieces, by name, in the order in which they are run. The long ones on other tasks are added where asked for."""


def long_pieces(passes: int) -> dict[str, Piece]:
    """ResNet-20 at 32x32 on all images: ours, and five alone with as many passes each."""

    def alone(rows: Sequence[Row], seeds: Sequence[int]) -> Iterator[Run]:
        for subnet in TASKS["long"].alone:
            yield Alone(name=alone_name(subnet), budget=passes, rate=rate_alone(rows, subnet), subnet=subnet)

    start, ours = Untrained(name="start", budget=0), replace(OURS, budget=passes)
    return {
        "long:start": Piece("long", "no training, statistics recalibrated", _single(start)),
        "long": Piece("long", f"the default for trained weights, {passes} passes", _single(ours)),
        "long:alone": Piece("long", f"five subnetworks alone, {passes} passes each", alone),
    }


def effnet_pieces(passes: int = 600) -> dict[str, Piece]:
    """EfficientNet-Lite0: ours, and three alone with as many passes each."""

    def alone(rows: Sequence[Row], seeds: Sequence[int]) -> Iterator[Run]:
        for subnet in TASKS["effnet"].alone:
            yield Alone(name=alone_name(subnet), budget=passes, rate=0.02, subnet=subnet)

    start, ours = Untrained(name="start", budget=0), replace(OURS, budget=passes)
    # a classifier that was trained on frozen features is a poor teacher of the whole model
    untaught = replace(ours, name="ours, dense teacher", **variant(teacher="dense"))
    return {
        "effnet:start": Piece("effnet", "no training but of the classifier", _single(start)),
        "effnet": Piece("effnet", f"the default for trained weights, {passes} passes", _single(ours)),
        "effnet:dense-teacher": Piece("effnet", "the same, taught by the dense network", _single(untaught)),
        "effnet:alone": Piece("effnet", f"three subnetworks alone, {passes} passes each", alone),
    }
