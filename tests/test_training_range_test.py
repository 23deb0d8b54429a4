"""``suggest_lr`` finds the rates at which the loss of the whole mix falls, and leaves nothing behind."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from training_tiny import assert_identical, result, tiny_net, tiny_trainer

import cocktailsdk as cocktail
from cocktailsdk import TrainingError
from cocktailsdk.training.range_test import LearningRateSuggestion
from cocktailsdk.training.rate_curve import RateCurve, best_rate
from cocktailsdk.training.recipes import Recipe
from cocktailsdk.training.step.engine import Stepper


def still(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.0)


ONE_ROUND = Recipe(name="one", rounds="one", masks="own", merging="none", schedule="rotation")


def trainer(net: cocktail.CocktailNet | None = None, **options: Any) -> cocktail.CoTrainer:
    defaults = {"recipe": ONE_ROUND, "start": "pretrained", "rewind_epoch": None, "merge": False, "optimizer": "sgd"}
    return tiny_trainer(net, **{**defaults, **options})


def test_nothing_is_left_of_a_range_test() -> None:
    net, untouched = tiny_net(), tiny_net()
    net.model.eval()
    gradient = torch.ones_like(net.model.fc.weight)
    net.model.fc.weight.grad = gradient
    statistics = {name: {k: v.clone() for k, v in of.items()} for name, of in net.statistics.items()}
    masks = {name: copy.deepcopy(net.mask_tensors(name)) for name in net.names}
    random = torch.get_rng_state()
    tested = trainer(net)
    tested.suggest_lr(12, highest=1e3)
    assert torch.equal(torch.get_rng_state(), random)
    assert not net.model.training
    assert net.model.fc.weight.grad is gradient and bool((gradient == 1).all())
    assert {k: [*v] for k, v in net.statistics.items()} == {k: [*v] for k, v in statistics.items()} and not net.metrics
    for name, of in masks.items():
        assert_identical(net.mask_tensors(name), of)
    assert_identical(dict(net.state_dict()), dict(untouched.state_dict()))
    tested.fit()
    plain = trainer(untouched)
    plain.fit()
    assert_identical(result(tested), result(plain))


def test_one_seed_gives_one_suggestion() -> None:
    suggestions = [trainer(seed=seed).suggest_lr(20) for seed in (0, 0, 1)]
    assert suggestions[0] == suggestions[1] != suggestions[2]
    again = trainer()
    assert again.suggest_lr(20) == again.suggest_lr(20) == suggestions[0]
    assert suggestions[0].optimizer == "SGD" and len(suggestions[0].rates) == len(suggestions[0].losses) == 20
    assert suggestions[0].rates[0] == pytest.approx(0.014 / 30) and suggestions[0].rates[-1] == pytest.approx(0.42)


@pytest.mark.parametrize("start", ["scratch", "pretrained"])
@pytest.mark.parametrize("recipe", ["cocktail", "paper", "us-net", ONE_ROUND])
def test_a_range_test_trains_as_any_recipe_does(recipe: Any, start: str) -> None:
    options: dict[str, Any] = {"recipe": recipe, "start": start}
    if recipe == "us-net":
        options["net"] = tiny_net(patterns=(cocktail.Channel(sparsities=[0.2, 0.4], round_to=1),))
    suggestion = trainer(**options).suggest_lr(12)
    assert suggestion.rates[0] <= suggestion.rate <= suggestion.rates[-1]


def test_the_suggestion_falls_as_the_loss_is_scaled_up() -> None:
    def scaled(factor: float) -> Any:
        return lambda output, target: factor * F.cross_entropy(output, target)

    rates = [
        trainer(loss_fn=scaled(f), distillation=cocktail.DistillationSettings(weight=0))
        .suggest_lr(40, lowest=1e-5)
        .rate
        for f in (1.0, 64.0)
    ]
    assert rates[1] < rates[0] / 8


def test_the_loss_is_that_of_training_distillation_included() -> None:
    def far(student: Tensor, teacher: Tensor) -> Tensor:
        return (student - teacher).square().mean() * 0 + 1000 + student.sum() * 0

    plain = trainer(distillation=cocktail.DistillationSettings(weight=0)).suggest_lr(10, highest=1.0).losses[0]
    distilled = trainer(distillation=cocktail.DistillationSettings(loss_fn=far)).suggest_lr(10, highest=1.0).losses[0]
    # of four networks that are measured, three learn from the dense one
    assert distilled == pytest.approx(0.75 * 500 + plain * (0.25 + 0.75 / 2), rel=0.1)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_rates_at_which_the_loss_is_not_finite_end_the_test(optimizer: str) -> None:
    suggestion = trainer(optimizer=optimizer, execution=cocktail.ExecutionSettings(on_nan="raise")).suggest_lr(
        40, highest=1e30
    )
    assert len(suggestion.rates) < 40
    assert all(math.isfinite(loss) for loss in suggestion.losses)
    assert suggestion.rate < 10


def test_parameters_beyond_the_models_are_put_back_too() -> None:
    temperature = nn.Parameter(torch.ones(()))

    def loss_fn(output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output * temperature, target)

    def optimizer(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD([{"params": list(parameters)}, {"params": [temperature], "lr": 0.1}], lr=0.01)

    suggestion = trainer(optimizer=optimizer, loss_fn=loss_fn).suggest_lr(12)
    assert float(temperature.detach()) == 1 and temperature.grad is None
    assert suggestion.rates[0] == pytest.approx(0.01 / 30)


@pytest.mark.parametrize(
    ("options", "arguments", "said"),
    [
        ({}, {"steps": 5}, r"suggest_lr\(steps=5\) is too short for a curve: write suggest_lr\(steps=60\)"),
        ({}, {"steps": 12.5}, "suggest_lr: steps must be a whole number"),
        ({}, {"lowest": 0}, "suggest_lr: lowest must be above 0, and finite, got 0"),
        ({}, {"lowest": 1.0}, r"suggest_lr\(lowest=1, highest=0.42\) is no range: write highest=900"),
        ({"optimizer": still}, {}, r"SGD has lr=0.0: give SGD a learning rate above 0, or write optimizer="),
        ({"loss_fn": lambda o, t: o.sum() * math.nan}, {}, "the training loss is nan before the first step, .*: check"),
        (
            {},
            {"lowest": 1e3, "highest": 1e6},
            r"rose clearly at the lowest rate, 1e\+03: write suggest_lr\(lowest=33\)",
        ),
    ],
)
def test_where_no_rate_can_be_suggested_the_error_says_what_to_type(
    options: dict[str, Any], arguments: dict[str, Any], said: str
) -> None:
    net = tiny_net()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    tested = trainer(net, **options, distillation=cocktail.DistillationSettings(weight=0))
    with pytest.raises(TrainingError, match=said):
        tested.suggest_lr(**arguments)
    assert_identical(dict(net.state_dict()), before)


RATES = [1e-4 * 2**i for i in range(16)]


def test_the_middle_of_the_valley_is_suggested_whatever_single_outliers_say() -> None:
    losses = [2 - 0.1 * i for i in range(10)] + [1.1, 1.1, 1.2, 2.0, 4.0, 8.0]
    rate = best_rate(RATES, losses, 2.0)
    assert rate is not None and RATES[7] < rate < RATES[12]
    losses[3], losses[10] = 0.0, 9.0
    outliers = best_rate(RATES, losses, 2.0)
    assert outliers is not None and rate / 2 <= outliers <= rate * 2
    assert best_rate(RATES, [2.0 + 0.1 * i for i in range(16)], 2.0) is None
    assert best_rate([], [], 2.0) is None


def test_a_suggestion_is_a_short_sentence_and_says_where_the_range_was_too_low() -> None:
    fallen = LearningRateSuggestion(0.0123, (0.001, 0.01, 0.1), (2.0, 1.0, 1.5), "SGD")
    assert str(fallen).startswith(
        "learning_rate=0.012 for SGD: between rates of 0.001 and 0.1 the loss fell from 2 to "
    )
    falling = LearningRateSuggestion(0.05, tuple(RATES), tuple(2 - 0.1 * i for i in range(16)), "AdamW")
    assert "it was still falling there: try suggest_lr(highest=" in str(falling)


def curve(losses: list[float], dense: list[float]) -> RateCurve:
    return RateCurve(2.0, 0.5, tuple(RATES), tuple(losses), tuple(dense))


def test_a_loss_that_does_not_fall_clearly_gives_the_rate_that_the_optimizer_has() -> None:
    flat = [2.0] * 16
    for losses in (flat, [2.0 - 0.004 * i for i in range(16)], [2.0 + 0.1 * (-1) ** i for i in range(16)]):
        assert curve(losses, [0.5] * 16).suggestion(0.01) == (0.01, False, False)
    rising = [2.0] * 8 + [2.0 * 1.2**i for i in range(8)]
    assert curve(rising, [0.5] * 16).suggestion(0.001) == (0.001, False, False)
    rate, fell, capped = curve(rising, [0.5] * 16).suggestion(1.0) or (0.0, True, False)
    assert RATES[6] <= rate <= RATES[9] and not fell and capped
    assert curve([9.0] * 16, [0.5] * 16).suggestion(0.01) is None


def test_the_rate_does_not_harm_the_dense_network() -> None:
    falling = [2 - 0.1 * i for i in range(10)] + [1.1, 1.1, 1.2, 2.0, 4.0, 8.0]
    free = curve(falling, [0.5] * 16).suggestion(0.01)
    assert free is not None and free[1:] == (True, False)
    harmed = curve(falling, [0.5] * 6 + [5.0] * 10).suggestion(0.01)
    assert harmed is not None and RATES[2] <= harmed[0] <= RATES[5] < free[0] and harmed[1:] == (True, True)
    at_once = curve(falling, [0.5] * 3 + [50.0] * 13).suggestion(0.01)
    assert at_once is None or at_once[0] <= RATES[2]


def test_a_rate_at_an_edge_of_the_range_and_a_test_that_showed_nothing_say_so() -> None:
    losses = tuple(1 + 0.1 * i for i in range(16))
    assert f"try suggest_lr(lowest={RATES[0] / 30:.2g})" in str(
        LearningRateSuggestion(RATES[0], tuple(RATES), losses, "SGD")
    )
    assert "try suggest_lr(highest=" in str(LearningRateSuggestion(RATES[-1], tuple(RATES), losses, "SGD"))
    nothing = str(LearningRateSuggestion(0.01, tuple(RATES), losses, "SGD", fell=False))
    assert "did not fall clearly, so the test showed nothing, and this is the optimizer's own rate" in nothing
    assert "close to the teacher" in nothing and "try" not in nothing
    capped = str(LearningRateSuggestion(0.01, tuple(RATES), losses, "SGD", capped=True))
    assert "above 0.01 the loss of the dense network, or the mean, rises clearly" in capped and "try" not in capped
    both = str(LearningRateSuggestion(RATES[0], tuple(RATES), losses, "SGD", capped=True))
    assert "rises clearly; it is the lowest rate of the test: try suggest_lr(lowest=" in both


def test_a_test_that_shows_nothing_suggests_the_optimizers_rate() -> None:
    suggestion = trainer(loss_fn=lambda o, t: o.sum() * 0, distillation=cocktail.DistillationSettings(weight=0))
    found = suggestion.suggest_lr(10)
    assert found.rate == 0.014 and not found.fell


def test_networks_take_turns_where_passes_follow_measured_need(monkeypatch: pytest.MonkeyPatch) -> None:
    """The passes that are owed must build up, or the dense network alone is trained."""
    trained: list[str] = []
    step = Stepper.step

    def spy(self: Stepper, of: Any, *args: Any) -> Any:
        trained.extend(one.subnet for one in of.passes)
        return step(self, of, *args)

    monkeypatch.setattr(Stepper, "step", spy)
    tested = trainer(recipe="pretrained")
    tested.suggest_lr(24)
    assert 1 <= trained.count("dense") <= 8 and len(set(trained)) > 3


def test_private_tensors_have_no_part_in_a_range_test_and_stay() -> None:
    """A run drops those of the run before when it begins, so the test measures what a run would train."""
    net = tiny_net()
    plain = trainer(net).suggest_lr(10, highest=1.0)
    bias = {name: net.model.fc.bias.detach() + 100 for name in net.names if name != "dense"}
    for name, value in bias.items():
        net.set_private(name, {"fc.bias": value})
    assert trainer(net).suggest_lr(10, highest=1.0) == plain
    assert all(torch.equal(net.private[name]["fc.bias"], value) for name, value in bias.items())
