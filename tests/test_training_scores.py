"""Runs whose masks are ranked by scores from data: when, on what, and that such a run resumes bit by bit."""

from __future__ import annotations

import dataclasses
import logging
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_loops import batches, follow, plain_net, trained
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import _get_current_dispatch_mode
from training_tiny import assert_identical, result, tiny_loaders, tiny_net, tiny_trainer

import cocktailsdk as cocktail
from cocktailsdk import PatternError, TrainingError
from cocktailsdk.calibration import CalibrationData
from cocktailsdk.calibration.observe import InputObserver
from cocktailsdk.masks import Mask
from cocktailsdk.patterns import rounds_of
from cocktailsdk.training import events as ev
from cocktailsdk.training.recipes import Pruning, recipe_named
from cocktailsdk.training.rivals.phases import Phases
from cocktailsdk.utils.nested import default_forward

PRETRAINED: dict[str, Any] = {"start": "pretrained", "recipe": "pretrained", "epochs": 1, "rewind_epoch": None}
MIXED = {"channel": "activation", "*": "wanda"}


class StopAt:
    """Interrupts at the n-th event."""

    def __init__(self, n: int) -> None:
        self.left = n

    def __call__(self, event: ev.Event) -> None:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


class Seen:
    """The masks of every round."""

    def __init__(self) -> None:
        self.trainer: cocktail.CoTrainer[Any] | None = None
        self.masks: dict[int, dict[str, Mask]] = {}

    def __call__(self, event: ev.Event) -> None:
        if isinstance(event, ev.RoundStarted) and self.trainer is not None:
            self.masks[event.round] = dict(self.trainer.net.masks)


def calibration() -> list[tuple[Tensor, Tensor]]:
    return [(x, y) for x, y in tiny_loaders()[1]]


def assert_same_masks(one: cocktail.CocktailNet, other: cocktail.CocktailNet) -> None:
    for name in one.masks:
        a, b = one.mask_tensors(name), other.mask_tensors(name)
        assert set(a) == set(b) and all(torch.equal(m, b[n]) for n, m in a.items()), name


@pytest.mark.parametrize("score", ["wanda", "sparsegpt", "fisher", MIXED])
def test_a_run_from_trained_weights_has_the_masks_that_sparsify_makes_by_the_score(score: Any) -> None:
    trainer = tiny_trainer(score=score, calibration=calibration(), **PRETRAINED)
    expected = cocktail.sparsify(
        tiny_net().model, trainer.net.patterns, (torch.zeros(1, 1, 8, 8),), score=score, calibration=calibration(),
        loss_fn=F.cross_entropy,
    )  # fmt: skip
    trainer.fit()
    assert_same_masks(trainer.net, expected)
    assert trainer.net.provenance["score"] == expected.provenance["score"]


def test_without_calibration_data_the_first_128_training_examples_are_used() -> None:
    train = tiny_loaders()[0]  # 6 batches of 8
    trainer = tiny_trainer(score="wanda", train_loader=train, **PRETRAINED)
    trainer.fit()
    noted = trainer.net.provenance["score"]["calibration"]
    assert noted["examples"] == 48
    many = [batch for _ in range(5) for batch in calibration()]  # 10 batches of 16
    trainer = tiny_trainer(score="wanda", train_loader=many, **PRETRAINED)
    trainer.fit()
    assert trainer.net.provenance["score"]["calibration"] == {
        "examples": 128,
        "fingerprint": CalibrationData.of(many[:8]).fingerprint,
    }


def test_every_round_judges_the_weights_that_it_prunes() -> None:
    seen = Seen()
    trainer = seen.trainer = tiny_trainer(score="wanda", calibration=calibration(), callbacks=[seen], recipe="cocktail")
    judged: list[dict[str, Tensor]] = []
    original = type(trainer._options.scoring).calibrate

    def noting(self: Any, net: Any, *arguments: Any) -> Any:
        judged.append({n: p.detach().clone() for n, p in net.model.state_dict().items()})
        return original(self, net, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(trainer._options.scoring), "calibrate", noting)
        trainer.fit()
    assert len(judged) == len(rounds_of(trainer.net.patterns))
    for round_, (weights, plan) in enumerate(zip(judged, rounds_of(trainer.net.patterns), strict=True), 1):
        fresh = tiny_net(5)
        fresh.model.load_state_dict(weights)
        scores = fresh.calibrate("wanda", calibration())
        (level,) = plan["unstructured"]
        before = None if round_ == 1 else seen.masks[round_][f"unstructured@{[0.3, 0.5, 0.7][round_ - 2]}"]
        mask = fresh.make_masks(level, before, scores=scores)
        assert all(torch.equal(m, seen.masks[round_][level.name].elements[n]) for n, m in mask.elements.items())


FEW = (cocktail.Unstructured(sparsities=[0.3, 0.5]), cocktail.Channel(sparsities=[0.4], round_to=1))
PHASES = dataclasses.replace(recipe_named("ac/dc"), schedule=Phases((0.2, 0.5, 0.7)))
RUNS: dict[str, dict[str, Any]] = {
    "cocktail": {"recipe": "cocktail", "epochs": 1, "rewind_epoch": None},
    "refilling": {"recipe": "refilling", "epochs": 1, "rewind_epoch": None, "alphas": (1.0,)},
    "pretrained": PRETRAINED,
    "ac/dc": {"recipe": PHASES},
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_with_a_score_resumes_bit_by_bit(name: str, tmp_path: Path) -> None:
    def trainer(**options: Any) -> cocktail.CoTrainer[Any]:
        net = tiny_net(0, ["unstructured@0.5"] if name == "ac/dc" else FEW)
        return tiny_trainer(net, **{"score": "wanda", **RUNS[name], **options})

    whole = trainer()
    whole.fit()
    for n in range(40):
        run = trainer(out_dir=tmp_path, callbacks=[StopAt(7 + n % 2)])
        try:
            run.fit()
        except KeyboardInterrupt:
            continue
        break
    assert n > 0
    assert_identical(result(run), result(whole))
    assert run.net.provenance == whole.net.provenance


def test_scores_draw_nothing_from_the_random_numbers_of_training() -> None:
    """A score that is magnitude in all but name trains as magnitude does."""

    def magnitudes(umg: cocktail.UMG) -> dict[str, Tensor]:
        torch.rand(3)
        return {name: value.abs() for name, value in umg.values.items()}

    runs = [tiny_trainer(score=score, recipe="cocktail") for score in ("magnitude", magnitudes)]
    for run in runs:
        run.fit()
    assert_identical(result(runs[0]), result(runs[1]))
    assert "score" not in runs[0].net.provenance
    assert set(runs[1].net.provenance["score"]) == {"patterns"}


def test_ctrl_c_while_a_score_is_judged_ends_the_run_which_resumes_bit_by_bit(tmp_path: Path) -> None:
    judged: list[int] = []

    def forward(model: nn.Module, batch: Any) -> tuple[Any, Any]:
        if isinstance(_get_current_dispatch_mode(), InputObserver):
            judged.append(len(judged))
            if judged == [0, 1]:
                os.kill(os.getpid(), signal.SIGINT)
        return default_forward(model, batch)

    def trainer(**options: Any) -> cocktail.CoTrainer[Any]:
        return tiny_trainer(tiny_net(0, FEW), score="wanda", forward_fn=forward, **PRETRAINED, **options)

    with pytest.raises(KeyboardInterrupt):
        trainer(out_dir=tmp_path).fit()
    assert judged == [0, 1]  # of 6 batches
    run, whole = trainer(out_dir=tmp_path), trainer()
    for one in (run, whole):
        one.fit()
    assert_identical(result(run), result(whole))


def test_a_run_with_another_score_or_other_calibration_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        tiny_trainer(score="wanda", calibration=calibration(), out_dir=tmp_path, callbacks=[StopAt(9)]).fit()
    with pytest.raises(TrainingError, match=r"training\.score\.channel: \"wanda\", now \"activation\""):
        tiny_trainer(score=MIXED, calibration=calibration(), out_dir=tmp_path).fit()
    with pytest.raises(TrainingError, match=r"training\.calibration"):
        tiny_trainer(score="wanda", calibration=calibration()[:1], out_dir=tmp_path).fit()
    with pytest.raises(TrainingError, match=r"training\.score"):
        tiny_trainer(out_dir=tmp_path).fit()


def test_a_shuffling_calibration_loader_gives_the_same_data_again() -> None:
    def fingerprint() -> str:
        data = torch.utils.data.TensorDataset(torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(1)))
        loader = torch.utils.data.DataLoader(data, 16, shuffle=True)
        torch.rand(7)  # from the global generator, whose state is not the run's
        return str(tiny_trainer(score="wanda", calibration=loader).configuration["training"]["calibration"])

    assert fingerprint() == fingerprint()


def test_the_score_of_sparsify_is_not_dropped_without_a_word(caplog: pytest.LogCaptureFixture) -> None:
    net = cocktail.sparsify(
        tiny_net().model, ["unstructured@0.5"], (torch.zeros(1, 1, 8, 8),), score="wanda", calibration=calibration()
    )
    with caplog.at_level(logging.WARNING):
        trainer = tiny_trainer(net, **PRETRAINED)
    assert "were ranked by wanda; calibrated on 32 examples" in caplog.text
    assert "CoTrainer(score=...)" in caplog.text
    trainer.fit()
    assert "score" not in net.provenance


def test_impossible_scores_are_refused_before_anything_is_trained() -> None:
    with pytest.raises(PatternError, match="did you mean 'wanda'"):
        tiny_trainer(score="wander")
    with pytest.raises(PatternError, match="the pattern 'unstructured' ranks elements"):
        tiny_trainer(score="activation")
    with pytest.raises(TrainingError, match="ranks channels by the weights that survive"):
        tiny_trainer(score=MIXED, recipe="refilling")
    with pytest.raises(TrainingError, match="calibration must be iterable again and again"):
        tiny_trainer(score="wanda", calibration=iter(calibration()))
    with pytest.raises(PatternError, match="put a single batch into a list"):
        tiny_trainer(score="wanda", calibration=torch.zeros(2, 1, 8, 8))


def test_a_mask_rule_that_does_not_rank_by_the_score_is_refused() -> None:
    def rule(pruning: Pruning) -> dict[str, Mask]:
        return {s.name: pruning.net.make_masks(s) for _, s in pruning.in_turn()}

    recipe = dataclasses.replace(recipe_named("pretrained"), masks=rule)
    with pytest.raises(TrainingError, match=r"call pruning\.make_masks\(subnet, previous\)"):
        tiny_trainer(score="wanda", **{**PRETRAINED, "recipe": recipe}).fit()


@pytest.fixture
def sharded_net() -> Iterator[cocktail.CocktailNet]:
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        net = tiny_net()
        fully_shard(net.model)
        yield net
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="PyTorch was built without torch.distributed")
def test_sharded_models_are_ranked_by_magnitude_only(sharded_net: cocktail.CocktailNet) -> None:
    scores = tiny_net().calibrate("wanda", calibration())
    for refused in (
        lambda: tiny_trainer(sharded_net, score="wanda"),
        lambda: cocktail.CoLoop(sharded_net, 100, score="wanda", calibration=calibration()),
        lambda: sharded_net.calibrate("wanda", calibration()),
        lambda: sharded_net.make_masks("1:2", scores=scores),
    ):
        with pytest.raises(PatternError, match=r"score 'wanda' sees whole weights, and the model's are sharded"):
            refused()


def test_a_loop_of_ones_own_ranks_by_the_score_as_the_trainer_does() -> None:
    data, net, theirs = batches(), plain_net(), plain_net()
    scores: dict[str, Any] = {"score": "fisher", "calibration": data[:2]}
    trainer = tiny_trainer(theirs, recipe="cocktail", train_loader=data, val_loader=data[:2], seed=5, **scores)
    trainer.fit()
    loop = cocktail.CoLoop(net, 48, seed=5, loss_fn=F.cross_entropy, **scores)
    follow(net, loop, data)
    loop.finish(data, data[:2], recalibration_batches=2)
    assert_identical(trained(net), trained(trainer.net))
    assert net.provenance["score"] == trainer.net.provenance["score"]
    with pytest.raises(TrainingError, match="the state is of another loop .*score"):
        cocktail.CoLoop(plain_net(), 48, seed=5).load_state_dict(loop.state_dict())


def test_a_loop_has_no_data_of_its_own_to_judge_by() -> None:
    with pytest.raises(PatternError, match="score 'wanda' is judged from data: give CoLoop calibration=loader"):
        cocktail.CoLoop(plain_net(), 100, score="wanda")
