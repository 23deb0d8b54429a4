"""Optimizers are chosen by name or by kind of model, with a rate that may be given alone."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from training_tiny import assert_identical, result, sgd, tiny_net, tiny_trainer

import cocktailsdk as cocktail
from cocktailsdk import TrainingError
from cocktailsdk.training.optimizers import choose_optimizer
from cocktailsdk.training.recipes import Recipe, recipe_named

BY_MODEL = Recipe(name="one", rounds="one", merging="none", schedule="rotation", optimizer_defaults="by model")
PRETRAINED: dict[str, Any] = {"start": "pretrained", "recipe": BY_MODEL, "rewind_epoch": None, "merge": False}


class RMSNorm(nn.Module):
    """A norm of a library's own, as transformers has them."""


class LlamaRMSNorm(RMSNorm):
    pass


class FrozenBatchNorm2d(nn.Module):
    """As torchvision has it; no batch norm of PyTorch's."""


def optimizer_of(**options: Any) -> dict[str, Any]:
    described = tiny_trainer(optimizer=options.pop("optimizer", None), **options).configuration["optimizer"]
    group = described["groups"][0]
    kept = ("lr", "momentum", "nesterov", "weight_decay")
    return {"class": described["class"], **{key: group[key] for key in kept if key in group}}


@pytest.mark.parametrize(
    ("layers", "chosen", "reason"),
    [
        ([nn.Linear(4, 4), nn.BatchNorm1d(4)], torch.optim.SGD, "batch norms"),
        ([nn.Linear(4, 4), nn.SyncBatchNorm(4), nn.LayerNorm(4)], torch.optim.SGD, "batch norms"),
        ([nn.Linear(4, 4), FrozenBatchNorm2d()], torch.optim.SGD, "batch norms"),
        ([nn.Linear(4, 4), nn.LayerNorm(4)], torch.optim.AdamW, "layer norms"),
        ([nn.Linear(4, 4), nn.RMSNorm(4)], torch.optim.AdamW, "layer norms"),
        ([nn.Linear(4, 4), LlamaRMSNorm()], torch.optim.AdamW, "layer norms"),
        ([nn.Linear(4, 4), nn.GroupNorm(2, 4)], torch.optim.SGD, "neither batch norms nor layer norms"),
        ([nn.Linear(4, 4)], torch.optim.SGD, "neither batch norms nor layer norms"),
    ],
)
def test_the_kind_of_norms_decides_about_the_optimizer(
    layers: list[nn.Module], chosen: type[torch.optim.Optimizer], reason: str
) -> None:
    model = nn.Sequential(*layers)
    choice = choose_optimizer(None, None, model, start="pretrained", by_model=True)
    assert choice.reason == f"chosen because the model has {reason}"
    assert type(choice.factory(model.parameters())) is chosen


@pytest.mark.parametrize(("width", "share"), [(16, 1), (64, 1), (128, 1 / 2), (640, 1 / 10)])
def test_the_rate_of_adamw_falls_with_the_width_of_the_model(width: int, share: float) -> None:
    rates = []
    for size in (64, width):
        model = nn.Sequential(nn.Embedding(8, size), nn.LayerNorm(size), nn.Linear(size, size), nn.Linear(size, 2))
        choice = choose_optimizer("adamw", None, model, start="pretrained", by_model=True)
        rates.append(choice.factory(model.parameters()).param_groups[0]["lr"])
    assert rates[1] == pytest.approx(rates[0] * share)


def test_a_default_depends_on_where_the_weights_come_from_and_on_the_recipe() -> None:
    paper = {"class": "SGD", "momentum": 0.9, "nesterov": False, "weight_decay": 1e-4}
    assert optimizer_of() == {**paper, "lr": 0.1}
    assert optimizer_of(recipe=BY_MODEL, merge=False) == {**paper, "lr": 0.1}
    assert optimizer_of(start="pretrained", rewind_epoch=None) == {**paper, "lr": 0.01}
    one_round = replace(BY_MODEL, optimizer_defaults="paper")
    assert optimizer_of(**{**PRETRAINED, "recipe": one_round}) == {**paper, "lr": 0.01}
    assert optimizer_of(**PRETRAINED) == {**paper, "lr": 0.014, "nesterov": True}


def test_a_rate_alone_replaces_that_of_the_default_and_of_named_optimizers() -> None:
    assert optimizer_of(learning_rate=0.05)["lr"] == 0.05
    assert optimizer_of(**PRETRAINED, learning_rate=0.05) == {**optimizer_of(**PRETRAINED), "lr": 0.05}
    assert optimizer_of(optimizer="sgd", learning_rate=1)["lr"] == 1.0
    adamw = optimizer_of(optimizer="adamw", learning_rate=0.002)
    assert adamw == {"class": "AdamW", "lr": 0.002, "weight_decay": 0.01}


def test_a_named_optimizer_is_the_same_run_as_the_default_it_names() -> None:
    by_name = tiny_trainer(**PRETRAINED, optimizer="sgd", learning_rate=0.014)
    assert by_name.fingerprint == tiny_trainer(**PRETRAINED, optimizer=None).fingerprint


def test_a_recipe_describes_its_defaults_only_where_it_sets_them() -> None:
    assert "optimizer_defaults" not in recipe_named("cocktail").describe()
    assert BY_MODEL.describe()["optimizer_defaults"] == "by model"


def test_the_choice_is_logged_when_training_begins(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "cocktailsdk.training.trainer")
    tiny_trainer(**PRETRAINED, optimizer=None, epochs=0.3).fit()
    tiny_trainer(epochs=1, optimizer=sgd, recipe="cocktail", val_loader=None, rewind_epoch=None).plan()
    said = [r.getMessage() for r in caplog.records if r.name == "cocktailsdk.training.trainer"]
    lines = [line for line in said if line.startswith("optimizer: ")]
    assert lines == ["optimizer: SGD, rate 0.014, chosen because the model has batch norms"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"optimizer": "adam"},
            r"""must be 'sgd' or 'adamw', or a function .*, got 'adam' \(str\): write optimizer="sgd",""",
        ),
        (
            {"optimizer": sgd, "learning_rate": 0.1},
            r'learning_rate=0.1 is for .*: write optimizer="sgd" or .* set lr=0.1 in',
        ),
        (
            {"optimizer": None, "learning_rate": 0},
            "learning_rate must be above 0, and finite, got 0: write learning_rate",
        ),
        (
            {"optimizer": None, "learning_rate": float("nan")},
            "learning_rate must be a number, got nan: write learning_",
        ),
        ({"optimizer": 3}, "optimizer must be callable, got int"),
    ],
)
def test_what_cannot_be_an_optimizer_or_a_rate_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(TrainingError, match=said):
        tiny_trainer(**options)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_run_with_a_named_optimizer_resumes_bit_for_bit(optimizer: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {**PRETRAINED, "optimizer": optimizer, "save_seconds": 0}

    def stop(event: Any) -> None:
        if type(event).__name__ == "StepDone" and event.done_steps == 5:
            raise KeyboardInterrupt

    whole = tiny_trainer(**options)
    whole.fit()
    with pytest.raises(KeyboardInterrupt):
        tiny_trainer(tiny_net(), tmp_path, **options, callbacks=[stop]).fit()
    resumed = tiny_trainer(tiny_net(), tmp_path, **options)
    resumed.fit()
    assert_identical(result(resumed), result(whole))


def test_one_network_is_fine_tuned_with_a_named_optimizer() -> None:
    net = tiny_net()
    loader = [(torch.randn(4, 1, 8, 8), torch.arange(4))] * 2
    tuned = cocktail.finetune(
        net, "1:2", loader, nn.functional.cross_entropy, total_steps=2, optimizer="adamw", learning_rate=1e-3
    )
    assert tuned.active == "1:2"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_default_for_layer_norms_trains_weights_of_any_width(dtype: torch.dtype) -> None:
    """The usual eps of Adam is 0 in float16."""
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)).to(dtype)
    optimizer = choose_optimizer(None, None, model, start="pretrained", by_model=True).factory(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e-5)
    optimizer.step()
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())
