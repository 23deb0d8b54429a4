"""The trainer's groups of settings, and the keywords of the version before."""

from __future__ import annotations

import dataclasses
import inspect
import json
import warnings
from pathlib import Path
from typing import Any, assert_type

import pytest
import torch
from torch.nn import functional as F
from training_tiny import grouped, tiny_loaders, tiny_net, tiny_trainer

import cocktailsdk as cocktail
from cocktailsdk import CocktailNet, CoTrainer, ExecutionSettings, OutputSettings, RoundSettings, TrainingError
from cocktailsdk.presets import get_preset
from cocktailsdk.training.keywords import MOVED, current_keywords
from cocktailsdk.training.settings import GROUPS, Settings

VALUES: dict[str, Any] = {
    "distill_weight": 0.25,
    "distill_fn": F.mse_loss,
    "rounds": 2,
    "rewind_epoch": 0,
    "rewind_schedule": True,
    "merge": False,
    "alphas": (1.0, 0.5),
    "metric_mode": "min",
    "recalibration_batches": 3,
    "forward_fn": lambda model, batch: (model(batch[0]), batch[1]),
    "steps_per_epoch": 4,
    "shard_loader": False,
    "accelerator": None,
    "mixed_precision": "bf16",
    "accumulate": 2,
    "clip_norm": 1.5,
    "ema": 0.9,
    "sync_batch_norm": True,
    "on_nan": "skip",
    "save_seconds": 1.0,
    "save_minutes": 2.0,
    "event_seconds": 0.5,
    "config": {"data": "tiny"},
}


def trainer(**keywords: Any) -> CoTrainer[CocktailNet]:
    train, held_out = tiny_loaders()
    return CoTrainer(tiny_net(), train, F.cross_entropy, val_loader=held_out, epochs=1, **keywords)


def test_every_keyword_of_the_version_before_has_a_setting() -> None:
    settings = {(group, f.name) for group, kind in GROUPS.items() for f in dataclasses.fields(kind)}
    newer = {("distillation", "temperature")}
    assert set(MOVED.values()) == settings - newer
    assert VALUES.keys() == MOVED.keys()


@pytest.mark.parametrize("name", VALUES)
def test_a_deprecated_keyword_is_the_setting_that_its_warning_names(name: str) -> None:
    group, setting = MOVED[name]
    with pytest.warns(DeprecationWarning, match=f"CoTrainer.{name}=") as caught:
        keywords = current_keywords({name: VALUES[name]}, caller="CoTrainer", stacklevel=2)
    assert keywords == {group: GROUPS[group](**{setting: VALUES[name]})}
    (warning,) = caught
    assert warning.filename == __file__
    assert f"is CoTrainer({group}={GROUPS[group].__name__}({setting}=" in str(warning.message)


def test_the_warning_says_what_to_write_and_points_to_the_call() -> None:
    with pytest.warns(DeprecationWarning, match="the old keywords go with the next version") as caught:
        run = trainer(clip_norm=1.0, rounds=2, merge=False)
    text = " ".join(str(w.message) for w in caught)
    assert "CoTrainer(clip_norm=1.0) is CoTrainer(execution=ExecutionSettings(max_grad_norm=1.0)) now" in text
    assert "CoTrainer(rounds=2, merge=False) is CoTrainer(rounds=RoundSettings(count=2, merge=False)) now" in text
    assert {w.filename for w in caught} == {__file__}
    assert run.fingerprint == trainer(**grouped({"clip_norm": 1.0, "rounds": 2, "merge": False})).fingerprint


def test_fine_tuning_and_presets_take_deprecated_keywords_too() -> None:
    with pytest.warns(
        DeprecationWarning, match=r"finetune\(event_seconds=0\) is finetune\(output=OutputSettings"
    ) as caught:
        cocktail.finetune(tiny_net(), "1:2", tiny_loaders()[0], F.cross_entropy, epochs=1, event_seconds=0)
    assert {w.filename for w in caught} == {__file__}
    preset = get_preset("digits")
    with pytest.warns(
        DeprecationWarning,
        match=r"prepare\(rounds=2\) is prepare\(rounds=RoundSettings\(rewind_epoch=3, count=2\)\) now",
    ):
        old = preset.prepare(epochs=3, rounds=2).trainer
    new = preset.prepare(epochs=3, rounds=dataclasses.replace(preset.training["rounds"], count=2)).trainer
    assert old.configuration["training"]["rewind_epoch"] == 3  # the preset's other settings of the group stay
    assert old.fingerprint == new.fingerprint


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"epoch": 3}, "unexpected keyword argument 'epoch'; did you mean epochs=?"),
        ({"max_grad_norm": 1.0}, "did you mean execution=ExecutionSettings(max_grad_norm=...)?"),
        ({"clip_nrm": 1.0}, "did you mean execution=ExecutionSettings(max_grad_norm=...)?"),
        ({"excution": None}, "did you mean execution=?"),
        ({"zzz": 1}, "it takes batches, calibration, callbacks, device"),
        (
            {"clip_norm": 1.0, "execution": ExecutionSettings()},
            "got execution= and the deprecated clip_norm: write execution=ExecutionSettings(max_grad_norm=1.0)",
        ),
    ],
)
def test_a_wrong_keyword_is_a_type_error_that_names_the_right_one(keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError) as caught:
        trainer(**keywords)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("group", "settings", "message"),
    [
        ("distillation", {"weight": 1.5}, "DistillationSettings.weight must be in 0 … 1, got 1.5"),
        ("distillation", {"loss_fn": 3}, "DistillationSettings.loss_fn must be callable, got int"),
        ("rounds", {"count": 0}, "RoundSettings.count must be at least 1, got 0"),
        ("rounds", {"alphas": (0.5, 2)}, "RoundSettings.alphas must be numbers in (0, 1]"),
        ("rounds", {"alphas": "1"}, "RoundSettings.alphas must be numbers in (0, 1]"),
        ("evaluation", {"metric_mode": "best"}, 'EvaluationSettings.metric_mode must be "max" or "min", got \'best\''),
        ("batches", {"steps_per_epoch": 1.5}, "BatchSettings.steps_per_epoch must be a whole number, got 1.5"),
        ("execution", {"max_grad_norm": 0}, "ExecutionSettings.max_grad_norm must be above 0, and finite, got 0"),
        ("execution", {"ema_decay": 1.0}, "ExecutionSettings.ema_decay must be between 0 and 1, got 1.0"),
        ("execution", {"mixed_precision": "half"}, 'mixed_precision must be None, "bf16" or "fp16", got \'half\''),
        ("output", {"save_minutes": -1}, "OutputSettings.save_minutes must be at least 0, got -1"),
    ],
)
def test_a_setting_that_makes_no_sense_is_named(group: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(TrainingError) as caught:
        GROUPS[group](**settings)
    assert message in str(caught.value)


def test_a_group_of_another_class_is_refused() -> None:
    with pytest.raises(
        TrainingError, match=r"rounds must be RoundSettings, got .*: write rounds=RoundSettings\(\.\.\.\)"
    ):
        Settings(rounds=ExecutionSettings())  # type: ignore[arg-type]


def test_groups_are_frozen_and_have_all_settings_of_the_trainer_as_keywords() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        RoundSettings().merge = False  # type: ignore[misc]
    keywords = [p.name for p in inspect.signature(CoTrainer).parameters.values() if p.kind is p.KEYWORD_ONLY]
    assert len(keywords) == 22
    assert keywords[-6:] == [f.name for f in dataclasses.fields(Settings)]


def test_the_configuration_keeps_the_flat_names_that_earlier_runs_have_in_theirs(tmp_path: Path) -> None:
    options = {k: v for k, v in VALUES.items() if k not in ("sync_batch_norm", "accelerator", "shard_loader")}
    run = tiny_trainer(**options)
    training = run.configuration["training"]
    same = {"distill_weight": 0.25, "metric_mode": "min", "rewind_schedule": True, "rounds": 2, "alphas": [0.5, 1.0]}
    renamed = {"mixed_precision": "bf16", "accumulate": 2, "clip_norm": 1.5, "ema": 0.9}
    assert {**same, **renamed}.items() <= training.items()
    assert training["distill_fn"] == "mse_loss" and run.configuration["config"] == {"data": "tiny"}
    assert json.loads(json.dumps(run.configuration)) == run.configuration


def test_the_net_that_fit_returns_has_the_type_of_the_one_given() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run = trainer(rounds=RoundSettings(count=1, merge=False), output=OutputSettings(event_seconds=0.0))
    net = run.fit()
    assert_type(net, CocktailNet)
    assert isinstance(net, CocktailNet) and net is run.net
    assert torch.isfinite(torch.tensor(net.metrics["dense"]))


def test_what_a_presets_warning_says_to_write_gives_the_same_run() -> None:
    preset = get_preset("digits")
    with pytest.warns(DeprecationWarning, match=r"RoundSettings\(rewind_epoch=3, merge=False\)"):
        old = preset.prepare(merge=False).trainer
    new = preset.prepare(rounds=RoundSettings(rewind_epoch=3, merge=False)).trainer
    assert old.fingerprint == new.fingerprint
    assert preset.prepare(rounds=None).trainer.fingerprint == preset.prepare().trainer.fingerprint
