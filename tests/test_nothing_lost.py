"""Runs that train nothing, metrics that are no numbers, optimizers that cannot be stepped, failures after training."""

from __future__ import annotations

import copy
import functools
import json
import math
import re
import shutil
import tempfile
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from training_tiny import assert_identical, result, tiny_loaders, tiny_net, tiny_trainer

import cocktailsdk as cocktail
from cocktailsdk.errors import TrainingError
from cocktailsdk.report.run import NetworkRow, RunReport, read_report
from cocktailsdk.training.left_out import check_trained, weight_sums
from cocktailsdk.training.merge.alpha_search import choose_alpha
from cocktailsdk.training.metrics import HeldOutLoss, Score, check_size, mean_score, readable
from cocktailsdk.training.state.history import RoundHistory

ALWAYS = settings(deadline=None, derandomize=True, max_examples=60)


@pytest.fixture(autouse=True, scope="module")
def rescued_here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    before, tempfile.tempdir = tempfile.tempdir, str(tmp_path_factory.mktemp("rescued"))
    yield
    tempfile.tempdir = before


def run(out: Path | None = None, **options: Any) -> cocktail.CoTrainer:
    net = tiny_net(patterns=["1:2", cocktail.Unstructured(sparsities=[0.5])])
    chosen = {"recipe": "cocktail", "rounds": 1, "epochs": 1, "rewind_epoch": 1, "merge": False, **options}
    return tiny_trainer(net, out, **chosen)


class Nan:
    """Cross-entropy that is NaN whenever a network of some names trains."""

    def __init__(self, net: cocktail.CocktailNet, *names: str) -> None:
        self.net, self.names = net, names

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        loss = F.cross_entropy(output, target)
        return loss * math.nan if self.net.active in self.names and output.requires_grad else loss


# --- steps that were left out ---


def test_a_run_of_which_every_step_is_skipped_is_no_success(tmp_path: Path) -> None:
    trainer = run(tmp_path, loss_fn=lambda o, t: F.cross_entropy(o, t) * math.nan, distill_weight=0, on_nan="skip")
    for _ in range(2):  # also where it is resumed
        with pytest.raises(TrainingError, match=r"all steps were left out \(6 of 'dense'\).*lower the learning rate"):
            trainer.fit()
    assert not trainer.net.metrics


def test_a_subnetwork_that_was_never_trained_is_named() -> None:
    trainer = run(distill_weight=0, on_nan="skip")
    trainer._options.__dict__["loss_fn"] = Nan(trainer.net, "1:2")
    with pytest.raises(TrainingError, match=r"'1:2' was never trained: all \d+ of its steps were left out"):
        trainer.fit()


def test_a_finetuning_of_which_every_step_is_skipped_is_no_success() -> None:
    net = tiny_net(patterns=["1:2"])
    with pytest.raises(TrainingError, match="nothing was trained in round 1"):
        cocktail.training.finetune(
            net,
            "1:2",
            tiny_loaders()[0],
            lambda o, t: F.cross_entropy(o, t) * math.nan,
            epochs=1,
            execution=cocktail.ExecutionSettings(on_nan="skip"),
        )


def test_steps_that_a_gradient_scaler_leaves_out_are_no_training() -> None:
    with pytest.raises(TrainingError, match=r'overflowed in half precision.*mixed_precision="bf16"'):
        run(loss_fn=lambda o, t: F.cross_entropy(o, t) * 1e37, mixed_precision="fp16", distill_weight=0).fit()


def test_rounds_of_which_some_steps_were_made_pass_and_older_records_are_not_judged() -> None:
    check_trained([RoundHistory(0, [], made={"dense": 1}, left_out={"dense": 9})], scaled=False, standing="")
    check_trained([RoundHistory(0, [], left_out={"dense": 9})], scaled=False, standing="")
    records = [RoundHistory(0, [], made={"dense": 3}), RoundHistory(1, [], made={}, left_out={"2:4": 2, "dense": 2})]
    with pytest.raises(TrainingError, match=r"nothing was trained in round 1.*2 of '2:4', 2 of 'dense'.*Stands\."):
        check_trained(records, scaled=False, standing="Stands.")


def looped(steps_made: bool, value: float = 0.0) -> tuple[cocktail.CoLoop, list[Any]]:
    net = tiny_net(patterns=["1:2"])
    data = [tuple(batch) for batch in tiny_loaders()[1]]
    loop = cocktail.CoLoop(net, steps=4)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for x, y in loop.batches(data):
        with loop.step((x, y)) as step:
            output = net.model(x)
            optimizer.zero_grad()
            step.loss(F.cross_entropy(output, y), output, y).backward()
        if steps_made:
            optimizer.step()
    if value:
        net.model.fc.weight.data[0, 0] = value  # type: ignore[union-attr, operator]
    return loop, data


def test_a_loop_whose_optimizer_never_stepped_does_not_finish() -> None:
    loop, data = looped(steps_made=False)
    with pytest.raises(TrainingError, match=r"no weight changed in 4 steps.*GradScaler"):
        loop.finish(data, data)
    loop, data = looped(steps_made=True, value=math.inf)
    with pytest.raises(TrainingError, match=r"fc\.weight became infinite"):
        loop.finish(data, data)
    looped(steps_made=True)[0].finish(data, data)


@ALWAYS
@given(st.integers(0, 2), st.integers(0, 31), st.sampled_from([1e-6, -1e-3, 1.0]))
def test_sums_tell_any_change_of_a_weight(layer: int, at: int, by: float) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    before = weight_sums(model)
    assert torch.equal(before, weight_sums(model))
    with torch.no_grad():
        model[layer].weight.view(-1)[at] += by  # type: ignore[union-attr, operator]
    assert not torch.equal(before, weight_sums(model))


# --- metrics ---


@pytest.mark.parametrize("mode", ["max", "min"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_metric_that_is_not_finite_is_recorded_as_nan_and_never_chosen(mode: str, bad: float) -> None:
    scores = [Score(Fraction(-1)), Score(mean(bad)), Score(Fraction(-3)), Score(mean(bad))]
    scores = [score.negated() for score in scores] if mode == "min" else scores
    choice = choose_alpha([1.0, 0.9, 0.8, 0.7], ["a"], lambda alpha, cell: scores[round(10 - 10 * alpha)])
    assert choice.alpha == (1.0 if mode == "max" else 0.8)
    assert math.isnan(scores[1].number) and math.isnan(readable(scores[1].value / 7))
    assert readable(Fraction(1, 4)) == 0.25


def mean(value: float) -> Fraction:
    score = mean_score(
        nn.Linear(1, 1), [torch.ones(4, 1)] * 2, lambda m, b: (m(b), b), lambda o, t: torch.full((len(t),), value)
    )
    return score.value


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("mode", ["max", "min"])
def test_a_metric_that_is_never_a_number_is_refused_at_the_start(value: float, mode: str) -> None:
    trainer = run(metric=lambda o, t: torch.full((len(t),), value), metric_mode=mode)
    with pytest.raises(TrainingError, match=r"metric\(output, target\) is not finite .*val_loader") as caught:
        trainer.fit()
    assert "\n" not in str(caught.value) and not trainer.history.steps


@pytest.mark.parametrize("mode", ["max", "min"])
def test_a_network_whose_metric_is_nan_keeps_nan_everywhere(mode: str, tmp_path: Path) -> None:
    holder: list[cocktail.CocktailNet] = []

    def metric(output: Tensor, target: Tensor) -> Tensor:
        hits = (output.argmax(1) == target).float()
        return hits * math.nan if holder and holder[0].active == "1:2" else hits

    trainer = run(metric=metric, metric_mode=mode)
    holder.append(trainer.net)
    trainer.fit()
    net = trainer.net
    assert math.isnan(net.metrics["1:2"]) and math.isfinite(net.metrics["dense"])
    assert math.isnan(trainer.evaluate(tiny_loaders()[1], ["1:2"])["1:2"])
    assert net.pick(max_flops=1e12, metric_mode=mode) != "1:2"
    net.save_pretrained(tmp_path / "bundle")
    read = cocktail.from_pretrained(tmp_path / "bundle", tiny_net(patterns=["1:2"]).model)
    assert math.isnan(read.metrics["1:2"])
    rows = tuple(NetworkRow(s.name, s.pattern, 0.5, 0.5, net.metrics[s.name], 1, 1) for s in net.subnets())
    report = RunReport(networks=rows, bundle_bytes=1, dense_bytes=1, seconds=1.0, preset="p", model="m", seed=0)
    report.write(tmp_path)
    json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)
    again = read_report(tmp_path)
    assert again is not None and math.isnan(next(r.metric for r in again.networks if r.name == "1:2"))


@pytest.mark.parametrize("count", [0, 1, 2, 31, 64])
def test_a_number_of_scores_that_fits_no_examples_is_refused_at_the_start(count: int) -> None:
    trainer = run(metric=lambda o, t: torch.full((count,), 0.5))
    with pytest.raises(TrainingError, match=rf"{count} scores? .* of 16 examples|no label") as caught:
        trainer.fit()
    assert "\n" not in str(caught.value) and not trainer.history.steps


@ALWAYS
@given(st.integers(3, 9), st.integers(2, 6), st.integers(0, 3), st.integers(0, 10**6))
def test_scores_of_examples_tokens_and_those_that_count_are_taken(n: int, length: int, dropped: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    labels, tokens = (torch.randint(1, 5, shape, generator=generator) for shape in ((n,), (n, length)))
    labels[: min(dropped, n - 2)] = -100
    tokens[:, length - 1] = 0
    for target in (labels, tokens, tokens[:, :1].float()):
        check_size(torch.rand(()), None, target)
        check_size(torch.rand(target.shape), None, target)
        check_size(torch.rand(n), None, target)
    check_size(torch.rand(int((labels >= 0).sum())), None, labels)
    check_size(torch.rand(int((tokens != 0).sum())), None, tokens)
    check_size(torch.rand(int((tokens[:, 1:] != 0).sum())), None, tokens)
    check_size(torch.rand(int((tokens == 2).sum()) or 1) > 0.5, None, tokens)
    for wrong in {n * length + 1, n + 1, 2} - {n, int((labels >= 0).sum())}:
        with pytest.raises(TrainingError, match="scores"):
            check_size(torch.rand(wrong), None, labels)


@pytest.mark.parametrize(
    ("metric", "found"),
    [
        (lambda o, t: 0.5, "float"),
        (lambda o, t: (o.argmax(1) == t).numpy(), "ndarray"),
        (lambda o, t: {"accuracy": torch.ones(16)}, "dict"),
        (lambda o, t: o @ t, "raised RuntimeError"),
        (lambda o: o, "raised TypeError"),
    ],
)
def test_metrics_that_give_no_scores_are_refused_at_the_start(metric: Any, found: str) -> None:
    trainer = run(metric=metric)
    with pytest.raises(TrainingError, match=found) as caught:
        trainer.fit()
    assert "\n" not in str(caught.value) and not trainer.history.steps


def test_a_loss_as_metric_counts_no_batch_of_which_nothing_counts() -> None:
    loss = HeldOutLoss(F.cross_entropy, -1, None)
    assert loss(torch.zeros(2, 3), torch.tensor([0, 1])).ndim == 0


# --- optimizers and schedules ---


class Sam(torch.optim.SGD):
    """Needs a closure, and does not say so."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert closure is not None, "needs a closure"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"optimizer": lambda p: torch.optim.LBFGS(p, lr=0.1)}, r"LBFGS\.step\(\) needs a closure"),
        ({"optimizer": lambda p: Sam(p, lr=0.1)}, r"Sam\.step\(\) raised AssertionError"),
        ({"optimizer": lambda p: torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)}, "none of the net's"),
        ({"optimizer": lambda p: None}, "must return an Optimizer, got NoneType"),
        (
            {"schedule": lambda o, n: torch.optim.lr_scheduler.ReduceLROnPlateau(o)},
            r"ReduceLROnPlateau\.step\(\) needs a metrics",
        ),
        ({"schedule": lambda o, n: None}, "must return a torch learning-rate scheduler"),
        ({"optimizer": lambda p: Sam(p, lr=-1)}, r"optimizer\(parameters\) raised ValueError .* for a list of"),
        ({"optimizer": lambda p: torch.optim.SparseAdam(list(p))}, r"SparseAdam\.step\(\) raised RuntimeError"),
        ({"schedule": lambda o: None}, r"schedule\(optimizer, steps\) raised TypeError .* for steps="),
        ({"out": ""}, "out_dir must be a folder's path, got ''"),
    ],
)
def test_what_cannot_be_stepped_is_refused_in_one_line(options: dict[str, Any], said: str) -> None:
    with pytest.raises(TrainingError, match=said) as caught:
        run(**options).fit()
    assert "\n" not in str(caught.value)


class Scaled(nn.Module):
    """A loss with a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(()))

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output * self.log_scale.exp(), target) + 0.1 * self.log_scale.square()


def test_parameters_that_are_not_the_nets_are_resumed_as_well(tmp_path: Path) -> None:
    def trainer(out: Path | None = None, **options: Any) -> tuple[cocktail.CoTrainer, Scaled]:
        loss = Scaled()
        optimizer = functools.partial(with_loss, loss)
        return run(out, loss_fn=loss, optimizer=optimizer, **options), loss

    def with_loss(loss: Scaled, parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD([*parameters, loss.log_scale], lr=0.1, momentum=0.9)

    whole, expected = trainer()
    whole.fit()
    left = [9]

    def stop(event: Any) -> None:
        left[0] -= type(event).__name__ == "StepDone"
        if not left[0]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path, callbacks=[stop])[0].fit()
    again, loss = trainer(tmp_path)
    again.fit()
    assert_identical(result(again), result(whole))
    assert torch.equal(loss.log_scale, expected.log_scale) and float(loss.log_scale.detach())


# --- failures after training ---


class Fails:
    """Raises at a call in which nothing trains, once that is asked for."""

    def __init__(self) -> None:
        self.active = False

    def __call__(self, value: Any) -> Any:
        if self.active:
            raise OSError("no space\nleft on device")
        return value


class Held:
    """Held-out batches that fail on demand."""

    def __init__(self, fails: Fails) -> None:
        self.inner, self.fails = list(tiny_loaders()[1]), fails

    def __iter__(self) -> Iterator[Any]:
        for batch in self.inner:
            yield self.fails(batch)


@pytest.mark.parametrize("what", ["metric", "val_loader", "forward_fn"])
@pytest.mark.parametrize(("recipe", "folder"), [("cocktail", True), ("paper", False)])
def test_a_failure_after_training_loses_no_step(what: str, recipe: str, folder: bool, tmp_path: Path) -> None:
    fails = Fails()
    steps = [0]

    def loss_fn(output: Tensor, target: Tensor) -> Tensor:
        steps[0] += output.requires_grad
        fails.active = fails.active or steps[0] == at
        return F.cross_entropy(output, target)

    def forward_fn(model: nn.Module, batch: Any) -> Any:
        return fails(model(batch[0])) if not torch.is_grad_enabled() and not model.training else model(batch[0]), batch[
            1
        ]

    def metric(output: Tensor, target: Tensor) -> Tensor:
        return fails(output.argmax(1) == target)

    def trainer(out: Path | None) -> cocktail.CoTrainer:
        options: dict[str, Any] = {"metric": metric} if what == "metric" else {}
        options |= {"val_loader": Held(fails)} if what == "val_loader" else {}
        options |= {"forward_fn": forward_fn} if what == "forward_fn" else {}
        return run(out, loss_fn=loss_fn, recipe=recipe, merge=recipe == "paper", save_minutes=60, **options)

    at = 10**9
    whole = trainer(None)
    whole.fit()
    at, first, steps[0] = steps[0], steps[0], 0
    if what == "val_loader":  # its batches are kept from round 0 on
        at = 6
    with pytest.raises(TrainingError, match="was saved in .* resumes from there") as caught:
        trainer(tmp_path if folder else None).fit()
    assert "\n" not in str(caught.value)
    fails.active, at = False, 10**9
    found = re.search(r"out_dir='([^']+)'", str(caught.value))
    assert folder != bool(found)
    again = trainer(Path(found[1]) if found else tmp_path)
    again.fit()
    assert steps[0] == first  # not one step was made again
    assert_identical(result(again), result(whole))


@pytest.mark.parametrize("active", [False, True])
@pytest.mark.parametrize("event", ["StepDone", "EpochEnded", "RoundEnded", "NetworkFinished", "Finished"])
def test_a_callback_that_raises_loses_no_step(event: str, active: bool, tmp_path: Path) -> None:
    steps, left, broken = [0], [10**9], [False]

    def loss_fn(output: Tensor, target: Tensor) -> Tensor:
        steps[0] += output.requires_grad
        return F.cross_entropy(output, target)

    def callback(told: Any) -> None:
        if broken[0] and steps[0] >= left[0] and type(told).__name__ == event:
            if active:
                trainers[-1].net.switch("1:2")
            raise ValueError("a callback's own error")

    def trainer(out: Path | None) -> cocktail.CoTrainer:
        made = run(out, loss_fn=loss_fn, save_minutes=60, save_seconds=1e6, event_seconds=0, callbacks=[callback])
        trainers.append(made)
        return made

    trainers: list[cocktail.CoTrainer] = []
    whole = trainer(None)
    whole.fit()
    first, left[0] = steps[0], 1 if event == "RoundEnded" else steps[0]
    for folder in (tmp_path, None):
        steps[0], broken[0] = 0, True
        with pytest.raises(ValueError, match="a callback's own error") as caught:
            trainer(folder).fit()
        assert trainers[-1].net.active == "dense"
        said = "".join(caught.value.__notes__)
        assert "The run was saved in " in said
        found = re.search(r"out_dir='([^']+)'", said)
        broken[0] = False
        again = trainer(folder or Path(found[1] if found else ""))
        again.fit()
        assert steps[0] == first  # not one step was made again
        assert_identical(result(again), result(whole))


def test_a_metric_that_stops_giving_scores_loses_no_step() -> None:
    given = [0]

    def metric(output: Tensor, target: Tensor) -> Tensor:
        given[0] += 1
        return (output.argmax(1) == target)[: 0 if given[0] > 4 else None]

    with pytest.raises(TrainingError, match=r"nothing to evaluate on: .* The run was saved in .* resumes from there"):
        run(None, metric=metric).fit()


def test_a_disk_that_fails_after_training_leaves_a_bundle(tmp_path: Path) -> None:
    def callback(event: Any) -> None:
        if type(event).__name__ == "NetworkFinished" and event.done == event.total:
            shutil.rmtree(tmp_path / "state")
            (tmp_path / "state").touch()

    trainer = run(tmp_path, callbacks=[callback])
    with pytest.raises(TrainingError, match="cannot be written") as caught:
        trainer.fit()
    found = re.search(r"from_pretrained\('([^']+)', model\)", str(caught.value))
    assert found and "\n" not in str(caught.value)
    again = cocktail.from_pretrained(found[1], copy.deepcopy(trainer.net.model))
    assert set(again.masks) == set(trainer.net.masks) and set(again.metrics) == set(trainer.net.metrics)


def test_what_fails_in_finish_leaves_the_net_and_saves_it(tmp_path: Path) -> None:
    loop, data = looped(steps_made=True)
    net = loop._net
    net.metrics["dense"] = 0.25
    fails = Fails()
    fails.active = True
    masks = {name: net.masks[name] for name in ("1:2",)}
    with pytest.raises(TrainingError, match=r"finish\(\) failed \(OSError: no space left.*saved in") as caught:
        loop.finish(data, Held(fails))
    assert "\n" not in str(caught.value)
    assert net.metrics == {"dense": 0.25} and net.masks["1:2"] is masks["1:2"]
    folder = re.search(r"saved in (\S+):", str(caught.value))
    assert folder is not None
    read = cocktail.from_pretrained(folder[1], tiny_net(patterns=["1:2"]).model)
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in read.state_dict().items())
    fails.active = False
    assert set(loop.finish(data, Held(fails)).metrics) == {"dense", "1:2"}


class Sizeless:
    """A data set whose length cannot be told."""

    def __len__(self) -> int:
        raise RuntimeError("not yet")


def test_what_a_run_writes_down_about_its_data_cannot_fail() -> None:
    net = tiny_net(patterns=["1:2"])
    loader = list(tiny_loaders()[0])

    class Loader(list[Any]):
        dataset = Sizeless()

    cocktail.CoTrainer(
        net, Loader(loader), F.cross_entropy, rounds=cocktail.RoundSettings(merge=False, count=1), epochs=1
    ).fit()
    assert net.provenance["data"] == {"class": "Sizeless"}
