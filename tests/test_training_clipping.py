"""Gradients are clipped to a quantile of the norms that the run itself has had."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from test_training_resume import StopAt
from torch import Tensor, nn
from torch.nn import functional as F
from training_tiny import assert_identical, result, tiny_loaders, tiny_net

import cocktailsdk as cocktail
from cocktailsdk import TrainingError
from cocktailsdk.training import StepContext, StepHook
from cocktailsdk.training import events as ev
from cocktailsdk.training.recipes import recipe_named
from cocktailsdk.training.step.clipping import AutoClip

RECIPE = replace(recipe_named("pretrained"), clip=0.5, refit_head="none")


class Norms(StepHook):
    """Notes the norm of all gradients before they are clipped."""

    def __init__(self) -> None:
        self.norms: list[float] = []

    def __deepcopy__(self, memo: Any) -> Norms:
        return self  # the run's copy and the test's are one

    def before_update(self, context: StepContext) -> None:
        self.norms.append(float(nn.utils.get_total_norm(list(context.gradients.values()))))


class Noting(torch.optim.SGD):
    """Notes the norm of all gradients that it gets."""

    norms: ClassVar[list[float]] = []

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        self.norms.append(float(nn.utils.get_total_norm(gradients)))
        super().step(closure)


def trainer(out_dir: Path | None = None, **options: Any) -> cocktail.CoTrainer:
    train, held_out = tiny_loaders()
    settings = {"recipe": RECIPE, "start": "pretrained", "epochs": 4, "val_loader": held_out, "out_dir": out_dir}
    return cocktail.CoTrainer(tiny_net(), train, F.cross_entropy, **{**settings, **options})


def test_a_step_has_the_gradient_of_the_quantile_where_its_own_is_longer() -> None:
    hook = Norms()
    Noting.norms = []

    def optimizer(parameters: Iterable[Tensor]) -> Noting:
        return Noting(parameters, lr=0.01)

    trainer(recipe=replace(RECIPE, hooks=(hook,)), optimizer=optimizer).fit()
    raw, clipped = hook.norms, Noting.norms
    assert len(raw) == len(clipped) >= 20
    for i, (before, after) in enumerate(zip(raw, clipped, strict=True)):
        limit = float(torch.tensor(raw[max(0, i - 99) : i + 1]).quantile(0.5))
        assert after == pytest.approx(min(before, limit), rel=1e-4)
    assert any(after < 0.99 * before for before, after in zip(raw, clipped, strict=True))


def test_a_clipped_run_resumes_bit_identically(tmp_path: Path) -> None:
    whole = trainer()
    whole.fit()
    stopped = trainer(tmp_path, output=cocktail.OutputSettings(event_seconds=0), callbacks=[StopAt(ev.StepDone, 9)])
    with pytest.raises(KeyboardInterrupt):
        stopped.fit()
    resumed = trainer(tmp_path)
    resumed.fit()
    assert_identical(result(resumed), result(whole))


def test_what_is_no_quantile_is_refused() -> None:
    for wrong in (0, 1, 1.5, True, "0.5"):
        with pytest.raises(TrainingError, match="clip must be a quantile between 0 and 1"):
            replace(RECIPE, clip=wrong)
    with pytest.raises(TrainingError, match="quantile must be between 0 and 1"):
        AutoClip(0.0)
    with pytest.raises(TrainingError, match="window is a number of steps"):
        AutoClip(window=0)
