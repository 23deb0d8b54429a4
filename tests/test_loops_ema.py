"""Rounds that end with an average of their weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from training_tiny import assert_identical, result, tiny_net, tiny_trainer

import cocktailsdk as cocktail
from cocktailsdk import TrainingError
from cocktailsdk.training import events as ev
from cocktailsdk.training.averaging import Average


class Watch:
    """Averages by hand what every step left, in double precision, and keeps what every round ended with."""

    def __init__(self, net: cocktail.CocktailNet, decay: float) -> None:
        self.net, self.decay, self.steps = net, decay, 0
        self.average: dict[str, Tensor] = {}
        self.expected: list[dict[str, Tensor]] = []
        self.ended: list[dict[str, Tensor]] = []

    def now(self) -> dict[str, Tensor]:
        return {n: p.detach().double() for n, p in self.net.model.named_parameters()}

    def __call__(self, event: ev.Event) -> None:
        if isinstance(event, ev.RoundStarted):
            self.average, self.steps = self.now(), 0
        if isinstance(event, ev.StepDone):
            self.steps += 1
            d = min(self.decay, (1 + self.steps) / (10 + self.steps))
            self.average = {n: d * self.average[n] + (1 - d) * p for n, p in self.now().items()}
        if isinstance(event, ev.RoundEnded):
            self.expected.append(self.average)
            self.ended.append(self.now())


@pytest.mark.parametrize("decay", [0.3, 0.999])
def test_every_round_ends_with_the_average_of_its_steps(decay: float) -> None:
    net = tiny_net()
    watch = Watch(net, decay)
    trainer = tiny_trainer(net, recipe="cocktail", ema=decay, callbacks=[watch])
    trainer.fit()
    assert len(watch.ended) == 5
    for expected, ended in zip(watch.expected, watch.ended, strict=True):
        for name, value in ended.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6)
    # what the run ends with is what the last round ended with
    assert all(torch.equal(p.detach().double(), watch.ended[-1][n]) for n, p in net.model.named_parameters())
    raw = tiny_trainer(recipe="cocktail")
    raw.fit()
    assert not torch.equal(raw.net.model.fc.weight, net.model.fc.weight)


@pytest.mark.parametrize("recipe", ["cocktail", "paper"])
@pytest.mark.parametrize("at", [3, 12, 31])
def test_a_run_with_averages_goes_on_identically(recipe: str, at: int, tmp_path: Path) -> None:
    def stop(event: ev.Event) -> None:
        if isinstance(event, ev.StepDone) and event.done_steps == at:
            raise KeyboardInterrupt

    straight = tiny_trainer(recipe=recipe, ema=0.9)
    straight.fit()
    with pytest.raises(KeyboardInterrupt):
        tiny_trainer(out_dir=tmp_path, recipe=recipe, ema=0.9, callbacks=[stop]).fit()
    resumed = tiny_trainer(tiny_net(seed=1), out_dir=tmp_path, recipe=recipe, ema=0.9)
    resumed.fit()
    assert_identical(result(resumed), result(straight))


def test_frozen_weights_are_not_averaged_and_half_precision_is_in_single() -> None:
    model = torch.nn.Linear(3, 2, dtype=torch.bfloat16)
    model.bias.requires_grad_(False)
    average = Average(model, 0.999)
    average.begin()
    assert average.nbytes == 6 * 4
    state = average.state_dict()
    assert list(state["values"]) == ["weight"] and state["values"]["weight"].dtype == torch.float32
    with torch.no_grad():
        model.weight.add_(1.0)
    average.update()
    first = state["values"]["weight"]
    assert ((model.weight - first).abs() < 1).all()
    average.load()
    assert torch.equal(model.weight, first.bfloat16())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ema": 0.0}, "ExecutionSettings.ema_decay must be between 0 and 1"),
        ({"ema": 1.0}, "ExecutionSettings.ema_decay must be between 0 and 1"),
        ({"ema": 0.9, "recipe": "imp", "patterns": ["1:2"]}, "'imp' keeps several sets of weights"),
    ],
)
def test_averages_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    net = tiny_net(patterns=options.pop("patterns", None))
    with pytest.raises(TrainingError, match=message):
        tiny_trainer(net, **options)


def test_a_run_with_averages_is_another_run_and_plans_their_memory() -> None:
    plain, averaged = tiny_trainer(), tiny_trainer(ema=0.9)
    assert plain.fingerprint != averaged.fingerprint
    assert "ema" not in plain.configuration["training"]
    weights = sum(p.nbytes for p in plain.net.model.parameters())
    assert averaged.plan().memory - plain.plan().memory == weights


def test_an_average_is_the_closed_form_to_the_last_bit_and_takes_one_copy_of_the_trained_weights() -> None:
    model = torch.nn.Linear(3, 2)
    average = Average(model, 0.5)
    average.begin()
    expected = model.weight.detach().clone()
    for step in range(1, 20):
        with torch.no_grad():
            model.weight.add_(torch.randn(2, 3))
        average.update()
        expected.lerp_(model.weight.detach(), 1 - min(0.5, (1 + step) / (10 + step)))
    state = average.state_dict()
    assert torch.equal(state["values"]["weight"], expected)
    assert sum(t.nbytes for t in average._average.parameters()) == average.nbytes
    again = Average(model, 0.5)
    again.load_state_dict({"steps": 19, "values": {name: t.clone() for name, t in state["values"].items()}})
    assert again.state_dict()["steps"] == 19
    again.load()
    assert torch.equal(model.weight, expected)
