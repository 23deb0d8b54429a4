"""The default from trained weights: one round, a frozen teacher, passes by measured need, a head that is refitted."""

from __future__ import annotations

import dataclasses
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_training_resume import StopAt
from torch import Tensor, nn
from torch.nn import functional as F
from training_tiny import assert_identical, result, tiny_images, tiny_loaders, tiny_net, tiny_trainer, to_float

import cocktailsdk as cocktail
from cocktailsdk import TrainingError
from cocktailsdk.presets.datasets import TensorLoader
from cocktailsdk.training import events as ev
from cocktailsdk.training import refit
from cocktailsdk.training.interrupt import Stopped
from cocktailsdk.training.recipes import PassAllocation, Recipe, recipe_named
from cocktailsdk.training.session import model_tensors
from cocktailsdk.training.step.distill import Classes, Distillation, soft_cross_entropy
from cocktailsdk.training.step.teacher import FrozenTeacher

PRETRAINED = recipe_named("pretrained")


def pretrained(net: cocktail.CocktailNet | None = None, out_dir: Path | None = None, **options: Any) -> Any:
    settings: dict[str, Any] = {
        "recipe": None,
        "start": "pretrained",
        "rewind_epoch": None,
        "epochs": None,
        "total_steps": 40,
    }
    return tiny_trainer(net, out_dir, **{**settings, "schedule": None, **options})


def recipe(**fields: Any) -> Recipe:
    return dataclasses.replace(PRETRAINED, **fields)


def test_the_start_chooses_the_default_recipe() -> None:
    train, held_out = tiny_loaders()
    for start, name, last in (("pretrained", "pretrained", 0.0), ("scratch", "cocktail", 0.1)):
        trainer = cocktail.CoTrainer(
            tiny_net(), train, F.cross_entropy, val_loader=held_out, start=start, total_steps=100
        )
        assert trainer.configuration["training"]["recipe"]["name"] == name
        assert trainer.configuration["schedule"]["rates"][-1] == pytest.approx(last)


def test_a_frozen_teacher_needs_trained_weights() -> None:
    with pytest.raises(TrainingError, match=r'untrained: give start="pretrained", or another recipe'):
        pretrained(recipe="pretrained", start="scratch")


@pytest.mark.parametrize("steps", [50, 73])
def test_a_budget_is_kept_exactly_and_every_pass_is_accounted_for(steps: int) -> None:
    patterns = (
        cocktail.Unstructured(),
        "n:m",
        cocktail.Channel(sparsities=[0.1 * k for k in range(1, 6)], round_to=1),
    )
    trainer = pretrained(tiny_net(0, patterns), total_steps=steps, merge=False)
    trainer.fit()
    (record,) = trainer.history.rounds
    assert trainer.history.steps == trainer.history.passes == sum(record.made.values()) == steps
    assert record.learning_rates[-1] < 1e-12  # the last step's rate is the schedule's last
    shares = trainer.history.measured[-1]["shares"]
    assert sum(shares.values()) == pytest.approx(1)
    assert record.made["dense"] == pytest.approx(shares["dense"] * steps, abs=1)


def test_masks_are_those_that_the_rounds_would_make_of_the_same_weights() -> None:
    net = tiny_net()
    made = {name: mask.tensors(net.coupling) for name, mask in net.masks.items()}
    pretrained(net, total_steps=2).fit()
    assert_identical({name: mask.tensors(net.coupling) for name, mask in net.masks.items()}, made)


def test_the_dense_network_is_measured_before_training() -> None:
    net = tiny_net()
    trainer = pretrained(net)
    expected = trainer.evaluate(tiny_loaders()[1], ["dense"])["dense"]
    trainer.fit()
    assert trainer.history.before == {"dense": expected}


@pytest.mark.parametrize("heads", ["shared", "own", "none"])
def test_a_run_stopped_many_times_resumes_identically(heads: str, tmp_path: Path) -> None:
    kind = recipe(refit_head=heads)
    options = {"recipe": kind, "execution": cocktail.ExecutionSettings(ema_decay=0.9)}
    whole = pretrained(**options)
    whole.fit()
    for n in range(40):
        run = pretrained(tiny_net(n), tmp_path, callbacks=[StopAt(ev.Event, 12 + n % 3)], **options)
        try:
            run.fit()
        except KeyboardInterrupt:
            continue
        break
    assert n > 1
    assert_identical(result(run), result(whole))


def test_the_teacher_is_the_model_that_the_run_started_from(tmp_path: Path) -> None:
    """Whatever is trained since, also by a run that is resumed: its outputs are those of the start, evaluated."""
    start = tiny_net().model.eval()
    seen: list[Tensor] = []

    def distill(student: Tensor, teacher: Tensor) -> Tensor:
        seen.append(teacher.clone())
        return (student - teacher).square().mean()

    distill.__qualname__ = "distill"
    batch = torch.stack([to_float(image) for image in tiny_images(8).images]), tiny_images(8).labels
    with torch.no_grad():
        expected = start(batch[0])
    options = {"train_loader": [batch], "distill_fn": distill, "recipe": recipe(refit_head="none")}
    with pytest.raises(KeyboardInterrupt):
        pretrained(tiny_net(), tmp_path, callbacks=[StopAt(ev.StepDone, 20)], **options).fit()
    resumed = pretrained(tiny_net(5), tmp_path, **options)
    resumed.fit()
    assert len(seen) >= 40
    assert all(torch.equal(output, expected) for output in seen)
    assert not all(torch.equal(a, b) for a, b in zip(resumed.net.model.parameters(), start.parameters(), strict=True))


def test_a_frozen_teacher_teaches_the_dense_network_too() -> None:
    """With nothing but its own output as a target, the dense network does not move."""
    net = tiny_net()
    net.model.dropout.p = 0.0
    train, held_out = tiny_loaders()
    for m in net.model.modules():  # in train mode batch norms would give the student another output than the teacher
        if isinstance(m, nn.BatchNorm2d):
            m.eval()
    before = {n: p.clone() for n, p in net.model.named_parameters()}
    alone = recipe(allocation=PassAllocation(dense=0.999, patterns={}, others=0.0), distill=1.0, refit_head="none")
    optimizer = lambda parameters: torch.optim.SGD(parameters, lr=0.1)  # noqa: E731 - decay would move the weights
    trainer = cocktail.CoTrainer(
        net, train, F.cross_entropy, val_loader=held_out, start="pretrained", recipe=alone, total_steps=5,
        optimizer=optimizer,
    )  # fmt: skip
    trainer.fit()
    assert trainer.history.rounds[-1].made == {"dense": 5}
    for name, parameter in net.model.named_parameters():
        torch.testing.assert_close(parameter, before[name], rtol=0, atol=1e-6)


def test_the_model_is_left_as_it_was_where_the_teacher_fails() -> None:
    net = tiny_net()
    before = {name: tensor.clone() for name, tensor in net.model.state_dict().items()}
    addresses = {name: tensor.data_ptr() for name, tensor in net.model.state_dict().items()}
    calls = 0

    def forward(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        nonlocal calls
        calls += not model.training
        if not model.training and calls > 20:  # the teacher's pass of some step
            raise RuntimeError("no more memory")
        return model(batch[0]), batch[1]

    trainer = pretrained(net, forward_fn=forward, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.0))
    with pytest.raises((RuntimeError, TrainingError), match="no more memory"):
        trainer.fit()
    assert net.active == "dense"
    for name, parameter in net.model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.data_ptr() == addresses[name]


def test_soft_targets_at_a_temperature_are_t_squared_kl() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(6, 5, generator=generator), torch.randn(6, 5, generator=generator)
    target = torch.tensor([0, 1, 2, 3, 4, -100])
    soft = soft_cross_entropy(student, teacher, target, Classes(1), 3.0)
    p, log_q = (teacher[:5] / 3).softmax(1), (student[:5] / 3).log_softmax(1)
    torch.testing.assert_close(soft, 9 * (p * (p.log() - log_q)).sum(1).mean())
    # at T = 1 the two losses differ by the teacher's entropy, and have the same gradients
    gradients = []
    for temperature in (1.0, 1.0 + 1e-6):
        leaf = student.clone().requires_grad_()
        soft_cross_entropy(leaf, teacher, target, Classes(1), temperature).backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-5)


def test_the_default_temperature_depends_on_the_shape_of_the_logits() -> None:
    generator = torch.Generator().manual_seed(0)
    for shape, target, axis, temperature in (
        ((4, 5), torch.arange(4), 1, 8.0),
        ((2, 3, 5), torch.arange(6).view(2, 3) % 5, -1, 1.0),
    ):
        student, teacher = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
        given = [Distillation(1.0, None, Classes(axis), t) for t in (None, temperature)]
        chosen, named = (loss(torch.zeros(()), student, teacher, target) for loss in given)
        assert torch.equal(chosen, named)


def test_a_temperature_is_refused_where_it_would_do_nothing() -> None:
    with pytest.raises(TrainingError, match="temperature is for the default loss"):
        cocktail.DistillationSettings(loss_fn=F.mse_loss, temperature=4.0)
    with pytest.raises(TrainingError, match=r"temperature must be above 0"):
        cocktail.DistillationSettings(temperature=0.0)


def test_measuring_need_leaves_statistics_and_random_numbers_alone() -> None:
    """The same run with and without measurements whose result is not used: equal shares either way."""
    runs = []
    # shares for which no tie is decided by their last bits
    shares: dict[str, Any] = {"dense": 0.2, "patterns": {"channel": 0.5, "unstructured": 0.32, "n:m": 0.18}}
    for allocation in (PassAllocation(floor=1.0, **shares), PassAllocation(floor=1 - 1e-12, **shares)):
        trainer = pretrained(recipe=recipe(allocation=allocation, refit_head="none"))
        trainer.fit()
        runs.append((trainer, {**result(trainer), "history": None}))
    assert not runs[0][0].history.measured
    assert len(runs[1][0].history.measured) == 7
    assert_identical(runs[0][1], runs[1][1])


def test_the_events_say_who_got_which_passes() -> None:
    events: list[ev.Event] = []
    trainer = pretrained(callbacks=[events.append], recipe=recipe(refit_head="own"))
    trainer.fit()
    measured = [event for event in events if isinstance(event, ev.NeedMeasured)]
    assert [event.step for event in measured] == [one["step"] for one in trainer.history.measured]
    assert measured[0].step == 0
    assert set(measured[0].losses) == set(measured[0].shares) == set(trainer.net.names)
    assert sum(measured[-1].passes.values()) == measured[-1].step
    refitted = [event for event in events if isinstance(event, ev.HeadRefitted)]
    assert [event.name for event in refitted] == trainer.net.names
    assert (refitted[-1].done, refitted[-1].total) == (len(trainer.net.names), len(trainer.net.names))


def test_a_model_without_logits_trains_without_a_head(caplog: pytest.LogCaptureFixture) -> None:
    """A regression: its own loss, no teacher."""
    x = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
    data = [(x[i : i + 16], x[i : i + 16, :2].sin()) for i in range(0, 64, 16)]
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 2))
    net = cocktail.sparsify(model, ("unstructured", "channel"), (x[:2],))
    options = {"val_loader": data, "start": "pretrained", "total_steps": 50}
    with pytest.raises(TrainingError, match="DistillationSettings"):
        cocktail.CoTrainer(net, data, F.mse_loss, **options).fit()
    off = cocktail.DistillationSettings(weight=0)
    with caplog.at_level(logging.INFO):
        trainer = cocktail.CoTrainer(net, data, F.mse_loss, distillation=off, **options)
        trainer.fit()
    assert "no classifier head is refitted: the task is not a classification" in caplog.text
    assert trainer.history.steps == 50


def test_a_run_says_that_more_steps_will_pay(caplog: pytest.LogCaptureFixture) -> None:
    """A short run from weights that were trained a little: the narrow networks are far from done."""
    net = tiny_net()
    train, held_out = tiny_loaders()
    cocktail.CoTrainer(net, train, F.cross_entropy, val_loader=held_out, total_steps=60).fit()
    with caplog.at_level(logging.WARNING):
        pretrained(net, total_steps=60).fit()
    assert "more steps will pay" in caplog.text


def test_without_held_out_data_need_is_measured_on_training_batches() -> None:
    trainer = pretrained(val_loader=None)
    trainer.fit()
    assert trainer.history.measured
    assert not trainer.history.before


def test_a_plan_counts_the_passes_that_networks_will_get() -> None:
    trainer = pretrained(total_steps=60)
    plan = trainer.plan()
    assert plan.steps == 60
    assert plan.costs.measuring > 0
    assert plan.memory > sum(p.nbytes for p in trainer.net.model.parameters())


def test_loaders_of_dictionaries_and_batches_of_few_examples_are_measured() -> None:
    loader = TensorLoader(tiny_images(12, seed=2), 3, to_float)
    trainer = pretrained(val_loader=loader)
    trainer.fit()
    assert trainer.history.measured


def loop_run(stop: int | None = None) -> dict[str, Tensor]:
    """Twenty steps of a loop of one's own, perhaps stopped and resumed in a new process."""
    train, _ = tiny_loaders()
    batches = [batch for _ in range(4) for batch in train][:20]
    net, done = tiny_net(), 0
    net.model.dropout.p = 0.0
    loop = cocktail.CoLoop(net, 20, start="pretrained")
    optimizer = torch.optim.SGD(net.model.parameters(), lr=0.05, momentum=0.9)
    trained = []
    while done < 20:
        with loop.step(batches[done]) as step:
            x, y = batches[done]
            output = net.model(x)
            optimizer.zero_grad()
            step.loss(F.cross_entropy(output, y), output, y).backward()
        optimizer.step()
        trained.append(step.network)
        done += 1
        if done == stop:
            states = loop.state_dict(), {n: t.clone() for n, t in net.model.state_dict().items()}
            momentum = optimizer.state_dict()
            net = tiny_net(7)
            net.model.dropout.p = 0.0
            loop = cocktail.CoLoop(net, 20, start="pretrained")
            net.model.load_state_dict(states[1])
            loop.load_state_dict(states[0])
            optimizer = torch.optim.SGD(net.model.parameters(), lr=0.05, momentum=0.9)
            optimizer.load_state_dict(momentum)
    assert trained.count("dense") in (3, 4)  # 18 % of 20
    return {name: tensor.clone() for name, tensor in net.model.state_dict().items()}


def test_a_loop_of_ones_own_follows_the_recipe_and_resumes_identically() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        whole = loop_run()
        torch.manual_seed(0)
        assert_identical(loop_run(stop=9), whole)


def test_a_loop_refuses_a_teacher_that_does_not_fit() -> None:
    loop = cocktail.CoLoop(tiny_net(), 20, start="pretrained")
    with pytest.raises(TrainingError, match="untrained"):
        cocktail.CoLoop(tiny_net(), 20, recipe="pretrained")
    with loop.step(next(iter(tiny_loaders()[0]))) as step:
        x, y = next(iter(tiny_loaders()[0]))
        step.loss(F.cross_entropy(output := loop._net.model(x), y), output, y).backward()
    state = loop.state_dict()
    state["teacher"]["fc.weight"] = torch.zeros(2, 2)
    with pytest.raises(TrainingError, match=r"its teacher's 'fc\.weight' does not fit"):
        loop.load_state_dict(state)


def test_every_setting_is_logged_with_the_defaults_filled_in(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        pretrained(total_steps=4).fit()
    (line,) = [r.getMessage() for r in caplog.records if r.getMessage().startswith("settings: ")]
    for setting in ("recipe.name=pretrained", "recipe.teacher=frozen", "recipe.allocation.dense=0.18", "steps=[4]",
                    "distill_weight=0.5", "optimizer.class=SGD", "optimizer.lr=0.1", "seed=0"):  # fmt: skip
        assert setting in line


class OneAtATime:
    """A loader that is its own iterator: whoever begins a second pass ends the first."""

    def __init__(self) -> None:
        self.batches = list(TensorLoader(tiny_images(), 8, to_float))
        self.place = 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> OneAtATime:
        self.place = 0
        return self

    def __next__(self) -> Any:
        if self.place == len(self.batches):
            raise StopIteration
        self.place += 1
        return self.batches[self.place - 1]


def test_measuring_on_training_batches_leaves_the_pass_that_is_open_alone(tmp_path: Path) -> None:
    """A resumed run loads the batches to measure on while the stream has the loader open."""
    whole = pretrained(train_loader=OneAtATime(), val_loader=None)
    whole.fit()
    stopped = pretrained(
        out_dir=tmp_path, train_loader=OneAtATime(), val_loader=None, callbacks=[StopAt(ev.StepDone, 2)]
    )
    with pytest.raises(KeyboardInterrupt):
        stopped.fit()
    resumed = pretrained(out_dir=tmp_path, train_loader=OneAtATime(), val_loader=None)
    resumed.fit()
    assert_identical(result(resumed), result(whole))


class Flat(nn.Module):
    """A batch norm that needs two examples, and an output that a test may change in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.norm, self.fc = nn.Linear(64, 32), nn.BatchNorm1d(32), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Any:
        return self.fc(F.relu(self.norm(self.body(x.flatten(1)))))


def flat(kind: type[nn.Module] = Flat) -> cocktail.CocktailNet:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = kind()
    return cocktail.sparsify(model, ("unstructured", "channel"), (torch.zeros(2, 1, 8, 8),))


@pytest.mark.parametrize(("examples", "size"), [(8, 1), (9, 4)])
def test_held_out_batches_of_one_example_do_not_end_the_run(examples: int, size: int) -> None:
    trainer = pretrained(flat(), val_loader=TensorLoader(tiny_images(examples, seed=2), size, to_float), total_steps=4)
    trainer.fit()
    assert all(math.isfinite(loss) for loss in trainer.history.measured[0]["losses"].values())


@pytest.mark.parametrize("bad", ["labels", "values"])
def test_a_held_out_batch_that_says_nothing_leaves_the_need_of_others_measurable(bad: str) -> None:
    batches = list(TensorLoader(tiny_images(16, seed=2), 4, to_float))
    x, y = batches[1]
    batches[1] = (x, torch.full_like(y, -100)) if bad == "labels" else (x * math.nan, y)
    trainer = pretrained(val_loader=batches, total_steps=4)
    trainer.fit()
    assert all(math.isfinite(loss) for loss in trainer.history.measured[0]["losses"].values())


class ProbabilitiesWhenEvaluating(Flat):
    def forward(self, x: Tensor) -> Any:
        output = super().forward(x)
        return output if self.training else output.softmax(-1)


class DictWhenTraining(Flat):
    def forward(self, x: Tensor) -> Any:
        output = super().forward(x)
        return {"logits": output} if self.training else output


def test_a_teacher_that_returns_probabilities_when_it_evaluates_is_refused() -> None:
    """At a temperature of 8 they are nearly uniform, so that students would unlearn everything."""
    wanted = r'where its output is probabilities, in train mode logits: .*teacher="dense"'
    with pytest.raises(TrainingError, match=wanted):
        pretrained(flat(ProbabilitiesWhenEvaluating)).fit()
    net = flat(ProbabilitiesWhenEvaluating)
    loop, (x, y) = cocktail.CoLoop(net, 20, start="pretrained"), next(iter(tiny_loaders()[0]))
    with loop.step((x, y)) as step, pytest.raises(TrainingError, match=wanted):
        step.loss(F.cross_entropy(output := net.model.train()(x), y), output, y)
    pretrained(flat(ProbabilitiesWhenEvaluating), recipe=recipe(teacher="dense"), total_steps=4).fit()


def test_a_distillation_loss_is_tried_on_the_teachers_output_before_training() -> None:
    def loss(output: Any, target: Tensor) -> Tensor:
        return F.cross_entropy(output["logits"] if isinstance(output, dict) else output, target)

    settings = cocktail.DistillationSettings(loss_fn=lambda s, t: F.mse_loss(s["logits"], t["logits"]))
    trainer = pretrained(flat(DictWhenTraining), loss_fn=loss, distillation=settings)
    with pytest.raises(TrainingError, match=r"dict of logits .* \(train mode\) and a teacher's that is a tensor"):
        trainer.fit()


def test_a_batch_with_nan_is_left_out_of_the_statistics_where_its_steps_are() -> None:
    batches = list(TensorLoader(tiny_images(), 8, to_float))
    batches[1] = (batches[1][0] * math.nan, batches[1][1])
    trainer = pretrained(train_loader=batches, on_nan="skip")
    trainer.fit()
    assert trainer.history.skipped
    for statistics in trainer.net.statistics.values():
        assert all(bool(value.isfinite().all()) for value in statistics.values())


def test_a_run_of_an_older_default_recipe_says_how_it_is_resumed(tmp_path: Path) -> None:
    pretrained(out_dir=tmp_path, recipe="cocktail", total_steps=40).fit()
    with pytest.raises(TrainingError, match="the run was of recipe 'cocktail', so give recipe='cocktail' to resume"):
        pretrained(out_dir=tmp_path).fit()


def test_numbers_of_numpy_make_a_run_that_can_be_saved(tmp_path: Path) -> None:
    pretrained(out_dir=tmp_path, total_steps=np.int64(2), seed=np.int32(1)).fit()
    pretrained(out_dir=tmp_path, total_steps=2, seed=1).fit()


def test_a_run_taught_by_the_dense_network_resumes_within_its_heads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its outputs depend on statistics, which are measured as heads are fitted."""
    by_dense = recipe(teacher="dense", refit_head="own")
    whole = pretrained(recipe=by_dense, total_steps=8)
    whole.fit()
    calls = 0

    def stop(session: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise Stopped

    monkeypatch.setattr(refit, "save_if_late", stop)
    with pytest.raises(KeyboardInterrupt):
        pretrained(out_dir=tmp_path, recipe=by_dense, total_steps=8).fit()
    resumed = pretrained(out_dir=tmp_path, recipe=by_dense, total_steps=8)
    resumed.fit()
    assert calls > 3
    assert_identical(result(resumed), result(whole))


class Counting(Flat):
    """Counts its passes, in a new tensor and in place."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("anew", torch.zeros(()))
        self.register_buffer("in_place", torch.zeros(()))

    def forward(self, x: Tensor) -> Any:
        self.anew = self.anew + 1
        self.in_place += 1
        return super().forward(x)


def test_passes_of_the_teacher_leave_the_buffers_of_both_alone() -> None:
    model = Counting()
    teacher = FrozenTeacher(model, model_tensors(model))
    model.anew += 5
    model.in_place += 5
    for _ in range(2):
        with teacher.active():
            assert model.anew == 0 == model.in_place
            model(torch.zeros(2, 1, 8, 8))
    assert model.anew == 5 == model.in_place
