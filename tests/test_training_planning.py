"""The cost of a run is known beforehand, and a budget of hours buys epochs or steps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from training_tiny import assert_identical, result, tiny_net, tiny_trainer

from cocktailsdk import TrainingError
from cocktailsdk.training import trainer as trainer_module
from cocktailsdk.training.planning import Costs
from cocktailsdk.training.recipes import Recipe


def test_a_plan_counts_what_the_run_then_does() -> None:
    trainer = tiny_trainer()
    plan = trainer.plan()
    assert (plan.rounds, plan.epochs, plan.steps) == (3, 2, 48)
    assert plan.candidates == 3 * (5 + 7)
    costs = plan.costs
    assert plan.seconds == pytest.approx(
        (12 + 18) * costs.dense_step + 18 * costs.sparse_step + (36 + 8) * costs.candidate
    )
    trainer.fit()
    assert trainer.history.judged <= plan.candidates


def test_planning_changes_nothing() -> None:
    net, untouched = tiny_net(), tiny_net()
    net.model.eval()
    before = torch.get_rng_state()
    planned = tiny_trainer(net)
    planned.plan()
    assert torch.equal(torch.get_rng_state(), before)
    assert not net.model.training
    assert not net.statistics
    assert all(p.grad is None for p in net.parameters())
    assert_identical(dict(net.state_dict()), dict(untouched.state_dict()))
    planned.fit()
    plain = tiny_trainer(untouched)
    plain.fit()
    assert_identical(result(planned), result(plain))


def test_the_memory_holds_weights_gradients_momentum_and_activations() -> None:
    net = tiny_net()
    weights = sum(t.nbytes for t in net.model.state_dict().values())
    small, large = tiny_trainer(net).plan().memory, None
    trainer = tiny_trainer(tiny_net())
    trainer._loaders.train.batch_size = 16  # type: ignore[attr-defined]
    large = trainer.plan().memory
    assert small > 3 * weights
    activations = 8 * 4 * (8 * 64 + 8 * 64)  # eight more images' two first feature maps, at the very least
    assert large - small > activations


def test_a_budget_of_hours_buys_whole_epochs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    costs = Costs(dense_step=1.0, sparse_step=2.0, candidate=0.5, memory=1)
    monkeypatch.setattr(trainer_module, "measure", lambda session: costs)
    # an epoch of every round: 6 dense steps, then 3 x (3 dense + 3 sparse); after them 36 + 8 networks
    epoch, after = 6 * 1.0 + 3 * (3 * 1.0 + 3 * 2.0), 44 * 0.5
    hours = (3 * epoch + after + 1) / 3600
    trainer = tiny_trainer(epochs=None, rewind_epoch=None, total_hours=hours, out_dir=tmp_path)
    trainer.fit()
    assert [len(r.losses) for r in trainer.history.rounds] == [3, 3, 3, 3]
    # going on, another speed changes nothing
    monkeypatch.setattr(trainer_module, "measure", lambda session: pytest.fail("measured again"))
    again = tiny_trainer(epochs=None, rewind_epoch=None, total_hours=hours, out_dir=tmp_path)
    assert again.fingerprint == trainer.fingerprint
    monkeypatch.setattr(trainer_module, "measure", lambda session: costs)
    with pytest.raises(
        TrainingError, match=r"total_hours=0.001 is too little: merging takes .*; write total_hours=0.016 or more"
    ):
        tiny_trainer(epochs=None, total_hours=0.001)
    with pytest.raises(TrainingError, match="give one of epochs, total_steps and total_hours; got epochs=2, total_h"):
        tiny_trainer(total_hours=1)


ONE_ROUND = Recipe(name="one", rounds="one", masks="own", merging="none", schedule="rotation")


@pytest.mark.parametrize(("left", "steps"), [(1.0, 1), (25.5, 13), (45.5, 24)])
def test_a_recipe_with_one_round_gets_the_steps_that_fit_into_its_hours(
    left: float, steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    costs = Costs(dense_step=1.0, sparse_step=2.0, candidate=0.5, memory=1)
    monkeypatch.setattr(trainer_module, "measure", lambda session: costs)
    # a cycle of the rotation: a dense step, then 7 subnetworks with 2 seconds each; afterwards 8 networks are measured
    options = {"recipe": ONE_ROUND, "start": "pretrained", "epochs": None, "rewind_epoch": None, "merge": False}
    hours = (left + 8 * 0.5) / 3600
    trainer = tiny_trainer(**options, total_hours=hours, out_dir=tmp_path)
    assert trainer._options.all_steps == steps
    trainer.fit()
    assert trainer.history.steps == steps
    # a resumed run keeps its steps, also where they make whole epochs
    monkeypatch.setattr(trainer_module, "measure", lambda session: pytest.fail("measured again"))
    again = tiny_trainer(**options, total_hours=hours, out_dir=tmp_path)
    assert again.fingerprint == trainer.fingerprint
    assert again._options.all_steps == steps


def test_hours_that_are_too_few_for_one_step_are_refused_with_the_least_that_will_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    costs = Costs(dense_step=3600.0, sparse_step=7200.0, candidate=1800, memory=1)
    monkeypatch.setattr(trainer_module, "measure", lambda session: costs)
    options = {"recipe": ONE_ROUND, "start": "pretrained", "epochs": None, "rewind_epoch": None, "merge": False}
    said = r"measuring every network takes up to 4 hours and one step 1; write total_hours=5.0 or more"
    with pytest.raises(TrainingError, match=said):
        tiny_trainer(**options, total_hours=4.9)
    assert tiny_trainer(**options, total_hours=5.0)._options.all_steps == 1


def test_a_run_of_hours_from_before_keeps_its_whole_epochs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # earlier versions gave a recipe with one round whole epochs; its stored configuration has no number of steps
    options = {"recipe": ONE_ROUND, "start": "pretrained", "rewind_epoch": None, "merge": False}
    written = tiny_trainer(**options, epochs=2).configuration
    written["training"]["total_hours"] = 3.0
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "configuration.json").write_text(json.dumps(written))
    monkeypatch.setattr(trainer_module, "measure", lambda session: pytest.fail("measured again"))
    resumed = tiny_trainer(**{**options, "epochs": None}, total_hours=3.0, out_dir=tmp_path)
    assert resumed.configuration == written
