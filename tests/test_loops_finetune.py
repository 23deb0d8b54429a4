"""One subnet, or a slim model, trained on alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from training_tiny import assert_identical, sgd, tiny_loaders, tiny_net

import cocktailsdk as cocktail
from cocktailsdk import SubnetError, TrainingError
from cocktailsdk.training import events as ev

OPTIONS: dict[str, Any] = {
    "epochs": 4,
    "optimizer": sgd,
    "evaluation": cocktail.EvaluationSettings(recalibration_batches=2),
    "output": cocktail.OutputSettings(event_seconds=0),
}


def whole(net: cocktail.CocktailNet) -> dict[str, Tensor]:
    return {n: t.clone() for n, t in net.state_dict().items()}


def zeros(net: cocktail.CocktailNet, name: str, model: nn.Module) -> int:
    """How many weights are masked; all of them are exactly 0."""
    parameters, count = dict(model.named_parameters()), 0
    for key, mask in net.mask_tensors(name).items():
        masked = parameters[key].detach()[mask.expand_as(parameters[key]) == 0]
        assert not masked.any(), key
        count += masked.numel()
    return count


@pytest.mark.parametrize("optimizer", [sgd, lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1)])
@pytest.mark.parametrize("name", ["unstructured@0.5", "1:2", "channel@0.4"])
def test_one_subnet_is_trained_under_its_mask_and_the_net_is_left_alone(name: str, optimizer: Any) -> None:
    net = tiny_net()
    before, mask = whole(net), net.masks[name]
    train, held_out = tiny_loaders()
    tuned = cocktail.finetune(
        net, name, train, F.cross_entropy, val_loader=held_out, **{**OPTIONS, "optimizer": optimizer}
    )
    assert_identical(whole(net), before)
    assert tuned.active == name and tuned.names == ["dense", name]
    assert_identical(dict(tuned.masks[name].elements), dict(mask.elements))
    assert zeros(tuned, name, tuned.model) > 100
    assert zeros(net, name, tuned.switch("dense").model) > 100  # the weights kept beside are no others
    assert not torch.equal(tuned.model.fc.weight, net.model.fc.weight)
    assert tuned.metrics[name] == tuned.metrics["dense"]
    with tuned.using(name), torch.no_grad():
        x = next(iter(held_out))[0]
        expected = tuned.model.eval()(x)
        torch.testing.assert_close(tuned.slim(name).eval()(x), expected, rtol=1e-4, atol=1e-5)


def test_fine_tuning_goes_on_identically(tmp_path: Path) -> None:
    def stop(event: ev.Event) -> None:
        if isinstance(event, ev.EpochEnded) and event.epoch == 1:
            raise KeyboardInterrupt

    train, held_out = tiny_loaders()
    options: dict[str, Any] = {**OPTIONS, "val_loader": held_out}
    straight = cocktail.finetune(tiny_net(), "1:2", train, F.cross_entropy, **options)
    with pytest.raises(KeyboardInterrupt):
        cocktail.finetune(tiny_net(), "1:2", train, F.cross_entropy, out_dir=tmp_path, callbacks=[stop], **options)
    resumed = cocktail.finetune(tiny_net(), "1:2", train, F.cross_entropy, out_dir=tmp_path, **options)
    assert_identical(whole(resumed), whole(straight))
    assert resumed.metrics == straight.metrics


def test_a_bundle_of_the_fine_tuned_network_loads(tmp_path: Path) -> None:
    tuned = cocktail.finetune(tiny_net(), "unstructured@0.3", tiny_loaders()[0], F.cross_entropy, **OPTIONS)
    tuned.save_pretrained(tmp_path / "bundle")
    loaded = cocktail.from_pretrained(tmp_path / "bundle", tiny_net(seed=1).model)
    assert_identical(whole(loaded), whole(tuned))


def test_masked_weights_that_something_else_moved_are_an_error() -> None:
    moved: list[Tensor] = []

    def optimizer(parameters: Any) -> torch.optim.Optimizer:
        moved[:] = list(parameters)
        return sgd(moved)

    def meddle(event: ev.Event) -> None:
        if isinstance(event, ev.EpochEnded):
            with torch.no_grad():
                moved[0].add_(1.0)

    options = {**OPTIONS, "optimizer": optimizer, "callbacks": [meddle]}
    with pytest.raises(TrainingError, match=r"masked weights of 'conv1.weight' are not 0 after fine-tuning"):
        cocktail.finetune(tiny_net(), "channel@0.4", tiny_loaders()[0], F.cross_entropy, **options)


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("dense", {}, TrainingError, "the dense network has none"),
        ("3:4", {}, SubnetError, "no subnet '3:4'"),
        ("1:2", {"recipe": "paper", "alphas": (1.0,)}, TrainingError, "leave out recipe, alphas"),
        ("1:2", {"epochs": 0}, TrainingError, "epochs must be above 0"),
    ],
)
def test_what_makes_no_sense_is_refused(name: str, options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        cocktail.finetune(tiny_net(), name, tiny_loaders()[0], F.cross_entropy, **options)
    with pytest.raises(TrainingError, match="sparsify"):
        cocktail.finetune(nn.Linear(2, 2), "1:2", [])  # type: ignore[arg-type]


def test_a_slim_model_trains_in_any_loop() -> None:
    net = tiny_net()
    slim = net.slim("channel@0.4").train()
    assert sum(p.numel() for p in slim.parameters()) < sum(p.numel() for p in net.model.parameters())
    optimizer = torch.optim.SGD(slim.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for _ in range(6):
        for x, y in tiny_loaders()[0]:
            loss = F.cross_entropy(slim(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    assert sum(losses[-6:]) < 0.8 * sum(losses[:6])


class NetOfMine(cocktail.CocktailNet):
    """A subclass with a constructor of its own."""

    def __init__(self, net: cocktail.CocktailNet) -> None:
        super().__init__(net.model, net.patterns, net.coupling, net.selection, net.example, net.masks)


def test_a_subclass_with_its_own_constructor_is_fine_tuned_and_loaded_as_a_plain_net(tmp_path: Path) -> None:
    net = NetOfMine(tiny_net())
    tuned = cocktail.finetune(net, "1:2", tiny_loaders()[0], F.cross_entropy, epochs=1, optimizer=sgd)
    assert type(tuned) is cocktail.CocktailNet
    net.save_pretrained(tmp_path / "bundle")
    loaded = NetOfMine.from_pretrained(tmp_path / "bundle", tiny_net().model)
    assert type(loaded) is cocktail.CocktailNet
    assert_identical(whole(loaded), whole(net))
