"""Exactly the steps that were asked for are made, on every batch of the loader, from wherever a run is resumed."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from training_tiny import assert_identical, grouped, result

import cocktailsdk as cocktail
from cocktailsdk import TrainingError
from cocktailsdk.training import events as ev
from cocktailsdk.training.budget import divide_steps, round_steps
from cocktailsdk.training.recipes import Recipe, recipe_named

FAST = settings(deadline=None, derandomize=True, max_examples=30)
RECIPES: dict[str, Recipe] = {
    "cocktail": recipe_named("cocktail"),
    "paper": replace(recipe_named("paper"), merging="none"),
    "same batch": replace(recipe_named("paper-finishing"), merging="none"),
    "one round": Recipe(name="one", rounds="one", rewind=False, merging="none"),
}


class Counting:
    """Numbered batches, in order; counts how often each was trained on."""

    def __init__(self, batches: int, *, known: bool = True) -> None:
        g = torch.Generator().manual_seed(0)
        self.batches = [(torch.randn(4, 6, generator=g), torch.arange(4) % 3, i) for i in range(batches)]
        self.known = known
        self.seen: Counter[int] = Counter()

    def __len__(self) -> int:
        if not self.known:
            raise TypeError("this loader has no length")
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)

    def forward(self, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        if model.training and torch.is_grad_enabled():
            self.seen[batch[2]] += 1
        return model(batch[0]), batch[1]


@cache
def _net() -> cocktail.CocktailNet:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    patterns = (cocktail.Unstructured(sparsities=[0.3, 0.6]), "1:2")
    return cocktail.sparsify(model, patterns, example_inputs=(torch.zeros(2, 6),))


def net() -> cocktail.CocktailNet:
    made = _net()
    return cocktail.CocktailNet(
        copy.deepcopy(made.model), made.patterns, made.coupling, made.selection, made.example, dict(made.masks)
    )


def trainer(loader: Any, **options: Any) -> cocktail.CoTrainer:
    defaults = {"merge": False, "recalibration_batches": 1, "event_seconds": 0, "save_seconds": 0, "alphas": (1.0,)}
    return cocktail.CoTrainer(net(), loader, F.cross_entropy, **grouped({**defaults, **options}))


@FAST
@given(
    st.integers(1, 9),
    st.none() | st.integers(1, 12),
    st.integers(3, 30),
    st.sampled_from(sorted(RECIPES)),
    st.sampled_from(["scratch", "pretrained"]),
    st.integers(1, 3),
    st.booleans(),
)
def test_a_budget_of_steps_is_kept_and_every_batch_used(
    length: int, per_epoch: int | None, total: int, recipe: str, start: str, accumulate: int, known: bool
) -> None:
    loader = Counting(length, known=known)
    run = trainer(
        loader,
        recipe=RECIPES[recipe],
        start=start,
        total_steps=total,
        steps_per_epoch=per_epoch,
        rounds=1,
        accumulate=accumulate,
        forward_fn=loader.forward,
    )
    planned = run.plan().steps
    loader.seen.clear()  # planning ran steps too
    run.fit()
    assert run.history.steps == planned == total
    if recipe != "same batch":  # of which a batch is trained on twice in a row
        # one step in a pass may get fewer batches than the others
        passes = [loader.seen[i] for i in range(length)]
        assert max(passes) - min(passes) <= 1, passes
    groups = -(-length // accumulate)
    assert set(loader.seen) == set(range(length)) or total < 2 * groups + 2


@FAST
@given(
    st.integers(1, 7),
    st.none() | st.integers(1, 9),
    st.integers(1, 3),
    st.sampled_from(sorted(RECIPES)),
)
def test_epochs_have_as_many_steps_as_were_asked(length: int, per_epoch: int | None, epochs: int, recipe: str) -> None:
    loader = Counting(length)
    run = trainer(
        loader,
        recipe=RECIPES[recipe],
        epochs=epochs,
        steps_per_epoch=per_epoch,
        rounds=1,
        rewind_epoch=0,
        forward_fn=loader.forward,
    )
    run.fit()
    rounds = {"cocktail": 4, "paper": 2, "one round": 1}.get(recipe)
    each = epochs * (per_epoch or length)
    assert run.history.steps == (rounds * each if rounds else run._options.all_steps)


@FAST
@given(
    st.integers(1, 9),
    st.floats(0.01, 3.5, allow_nan=False),
    st.sampled_from(sorted(RECIPES)),
    st.sampled_from(["scratch", "pretrained"]),
    st.booleans(),
)
def test_a_fraction_of_an_epoch_is_a_whole_number_of_steps(
    length: int, epochs: float, recipe: str, start: str, rewind_schedule: bool
) -> None:
    loader = Counting(length)
    each = max(1, round(epochs * length))
    # a single epoch cannot be rewound to its end, and some recipes rewind nothing
    rewind_schedule = rewind_schedule and each != length and RECIPES[recipe].rewind
    run = trainer(
        loader,
        recipe=RECIPES[recipe],
        start=start,
        epochs=epochs,
        rounds=1,
        forward_fn=loader.forward,
        rewind_schedule=rewind_schedule,
    )
    assert run.plan().steps == run._options.all_steps
    run.fit()
    rounds = [run._options.steps_of(k) for k in range(run._options.first_round, 2)]
    assert run.history.steps == run._options.all_steps
    assert rounds[0] == each
    rewound = run._options.rewind_epoch * length if rewind_schedule and run._options.rewinds else 0
    assert rounds[1:] in ([], [each - rewound], [each])


@pytest.mark.parametrize("recipe", sorted(RECIPES))
@pytest.mark.parametrize("start", ["scratch", "pretrained"])
def test_whole_epochs_are_the_same_run_however_they_are_written(recipe: str, start: str) -> None:
    runs = [
        trainer(Counting(5), recipe=RECIPES[recipe], start=start, epochs=e) for e in (2, 2.0, np.int64(2), Fraction(2))
    ]
    assert len({run.fingerprint for run in runs}) == 1
    assert runs[0].configuration["training"]["epochs"] == 2 and "steps" not in runs[0].configuration["training"]
    part = trainer(Counting(5), recipe=RECIPES[recipe], start=start, epochs=1.5)
    assert part.configuration["training"]["epochs"] == 2
    assert part.configuration["training"]["steps"][0] == 8  # of 7.5, rounded to even as Python does
    assert part.fingerprint != runs[0].fingerprint


def test_one_round_trains_24_subnetworks_in_fifty_steps() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16))
    model.extend([nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 4)])
    x, y = torch.randn(96, 1, 8, 8), torch.arange(96) % 4
    net = cocktail.sparsify(model, ["unstructured", "n:m", "channel"], example_inputs=(x[:2],))
    assert len(net.names) >= 23
    recipe = Recipe(name="one", rounds="one", masks="own", merging="none", schedule="rotation")
    run = cocktail.CoTrainer(
        net,
        DataLoader(TensorDataset(x, y), 8),
        F.cross_entropy,
        recipe=recipe,
        start="pretrained",
        total_steps=50,
        evaluation=cocktail.EvaluationSettings(recalibration_batches=1),
    )
    run.fit()
    assert run.history.steps == 50
    assert set(run.history.rounds[0].made) == {"dense", *net.names}
    assert set(net.statistics) >= set(net.names)


@given(st.integers(1, 400), st.integers(1, 20), st.sampled_from([0.0, 0.01, 0.25, 0.5, 0.9]), st.integers(1, 9))
@settings(deadline=None, derandomize=True, max_examples=200)
def test_a_division_adds_up_or_says_what_it_takes(steps: int, rounds: int, finishing: float, per_epoch: int) -> None:
    need = rounds + (finishing > 0)
    if steps < need:
        with pytest.raises(TrainingError, match=rf"^steps={steps} is too small: .*; give steps={need} or more"):
            round_steps(steps, rounds, finishing)
        return
    parts = round_steps(steps, rounds, finishing)
    assert sum(parts) == steps and min(parts) >= 1 and len(parts) == need
    for rewound in (False, True):
        division = divide_steps(
            steps, rounds, finishing, per_epoch, rewind_epoch=None, start="scratch", rewound=rewound
        )
        assert 0 <= division.rewind_epoch <= division.epochs
        if division.budget:
            assert sum(division.budget) == steps and min(division.budget) >= 1


@settings(deadline=None, derandomize=True, max_examples=15)
@given(st.data())
def test_a_run_resumed_anywhere_equals_one_that_never_stopped(data: st.DataObject) -> None:
    length, per_epoch = data.draw(st.integers(2, 7)), data.draw(st.none() | st.integers(1, 9))
    options: dict[str, Any] = {
        "recipe": RECIPES[data.draw(st.sampled_from(sorted(RECIPES)))],
        "total_steps": data.draw(st.integers(4, 20)),
        "steps_per_epoch": per_epoch,
        "rounds": 1,
        "accumulate": data.draw(st.integers(1, 2)),
    }
    if data.draw(st.booleans()):
        options["epochs"] = options.pop("total_steps") / 7
    stops = data.draw(st.lists(st.integers(1, 20), min_size=1, max_size=3))

    def loader() -> DataLoader[Any]:
        x, y = torch.randn(4 * length, 6, generator=torch.Generator().manual_seed(0)), torch.arange(4 * length) % 3
        return DataLoader(TensorDataset(x, y), 4, shuffle=True, generator=torch.Generator().manual_seed(5))

    whole = trainer(loader(), **options)
    whole.fit()

    def stop(event: ev.Event) -> None:
        if isinstance(event, ev.StepDone) and stops and event.done_steps >= stops[0]:
            stops.pop(0)
            raise KeyboardInterrupt

    with TemporaryDirectory() as folder:
        while True:
            run = trainer(loader(), out_dir=Path(folder), callbacks=[stop], **options)
            try:
                run.fit()
                break
            except KeyboardInterrupt:
                continue
    assert_identical(result(run), result(whole))


class Endless(IterableDataset[Any]):
    """Batches without an end or a length."""

    def __iter__(self) -> Iterator[Any]:
        for i in range(10**9):
            yield torch.full((6,), float(i % 5)), i % 3


def test_a_loader_without_an_end_is_read_on_from_epoch_to_epoch() -> None:
    seen: list[float] = []

    def forward(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        if model.training and torch.is_grad_enabled():
            seen.append(float(batch[0][0, 0]))
        return model(batch[0]), batch[1]

    loader = DataLoader(Endless(), 2)
    run = trainer(loader, recipe=RECIPES["one round"], total_steps=6, steps_per_epoch=2, forward_fn=forward)
    run.fit()
    assert seen == [0.0, 2.0, 4.0, 1.0, 3.0, 0.0]


def test_one_subnet_is_fine_tuned_for_a_single_step() -> None:
    tuned = cocktail.finetune(
        net(),
        "1:2",
        Counting(4).batches,
        F.cross_entropy,
        total_steps=1,
        batches=cocktail.BatchSettings(forward_fn=lambda m, b: (m(b[0]), b[1])),
    )
    assert tuned.active == "1:2"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"total_steps": 1}, "total_steps=1 is too small: 4 rounds and finishing need at least one step each"),
        ({"total_steps": 0}, "total_steps must be at least 1, got 0"),
        ({"total_steps": 2.5}, "total_steps must be a whole number, got 2.5: write total_steps=400"),
        ({"total_steps": True}, "total_steps must be a whole number"),
        (
            {"epochs": -3},
            "epochs must be above 0, and finite, got -3: write epochs=20, or a fraction such as epochs=0.5",
        ),
        ({"epochs": 0}, "epochs must be above 0, and finite, got 0: write epochs=20"),
        ({"epochs": 0.0}, "epochs must be above 0, and finite, got 0.0: write epochs=20"),
        ({"epochs": math.nan}, "epochs must be a number, got nan: write epochs=20"),
        ({"epochs": math.inf}, "epochs must be above 0, and finite, got inf: write epochs=20"),
        ({"epochs": True}, "epochs must be a number, got True (bool): write epochs=20"),
        ({"epochs": "20"}, "epochs must be a number, got '20' (str): write epochs=20"),
        ({"epochs": 1, "rounds": 0}, "RoundSettings.count must be at least 1, got 0"),
        ({"epochs": 1, "steps_per_epoch": -1}, "steps_per_epoch must be at least 1"),
        ({"epochs": 1, "seed": 1.5}, "seed must be a whole number, got 1.5"),
        ({"epochs": 1, "alphas": 0.5}, "RoundSettings.alphas must be numbers"),
        ({"epochs": 1, "callbacks": print}, "callbacks must be"),
        ({"epochs": 1, "out_dir": 3}, "out_dir must be"),
        ({"total_hours": float("nan")}, "total_hours must be a number, got nan"),
        ({"total_hours": -1}, "total_hours must be above 0, and finite, got -1: write total_hours=1.5"),
        ({"epochs": 1, "total_steps": 5}, "give one of epochs, total_steps and total_hours; got epochs=1, total_s"),
        ({"epochs": 1, "device": "cuda:99"}, "device='cuda:99' cannot be used"),
        ({"epochs": 1, "device": "gpu"}, "device='gpu' is no device that PyTorch knows; found here: cpu"),
        ({"epochs": 1, "device": "meta"}, "device='meta' cannot be used"),
    ],
)
def test_arguments_that_cannot_be_are_refused_in_one_line(options: dict[str, Any], said: str) -> None:
    refused = Counting(3)
    with pytest.raises(TrainingError) as caught:
        trainer(refused, **{"rounds": 3, **options})
    assert said in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 300
    assert not refused.seen


@pytest.mark.parametrize("steps", [0, -1, 1, 2.0, True, "10"])
def test_a_loop_of_ones_own_refuses_such_budgets_too(steps: Any) -> None:
    with pytest.raises(TrainingError, match=r"^steps"):
        cocktail.CoLoop(net(), steps)
