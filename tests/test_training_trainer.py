"""The whole run: rounds, rewinding, results, and what may be given to it."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from training_tiny import (
    assert_identical,
    grouped,
    result,
    tiny_images,
    tiny_loaders,
    tiny_net,
    tiny_trainer,
    to_float,
)

import cocktailsdk as cocktail
from cocktailsdk import TrainingError
from cocktailsdk.training import events as ev


@pytest.fixture(scope="module")
def trained() -> cocktail.CoTrainer:
    trainer = tiny_trainer(epochs=6)
    trainer.fit()
    return trainer


def weights(net: cocktail.CocktailNet) -> dict[str, Tensor]:
    return {n: t.detach().clone() for n, t in [*net.model.named_parameters(), *net.model.named_buffers()]}


# ------------------------------------------------------------------ results


def test_a_run_ends_with_every_network_measured_and_the_dense_one_active(trained: cocktail.CoTrainer) -> None:
    net = trained.net
    assert net.active == "dense"
    assert list(net.metrics) == net.names
    assert set(net.statistics) == set(net.names)
    assert net.metrics["dense"] > 0.9
    assert sum(net.metrics.values()) / len(net.metrics) > 0.6  # chance is 0.25


def test_the_metrics_are_those_that_evaluate_finds(trained: cocktail.CoTrainer) -> None:
    _, held_out = tiny_loaders()
    assert trained.evaluate(held_out) == pytest.approx(trained.net.metrics)
    assert list(trained.evaluate(held_out, ["dense", "1:2"])) == ["dense", "1:2"]


def test_masks_hold_after_merging(trained: cocktail.CoTrainer) -> None:
    net = trained.net
    for pattern in ("unstructured", "channel"):
        levels = [net.masks[n] for n in net.names if n.startswith(pattern)]
        for wide, narrow in itertools.pairwise(levels):
            for name, keep in narrow.elements.items():
                assert not (keep & ~wide.elements[name]).any()
            if narrow.removed is not None:
                assert not (wide.removed & ~narrow.removed).any()
    with net.using("1:2"):
        runs = net.model.conv3.weight.movedim(1, -1).reshape(-1, 2)
        assert ((runs != 0).sum(1) <= 1).all()
    dense = weights(net)
    for name in net.names:
        with net.using(name):
            pass
    assert_identical(weights(net), dense)


def test_the_history_tells_of_every_round(trained: cocktail.CoTrainer) -> None:
    history = trained.history
    assert [r.round for r in history.rounds] == [0, 1, 2, 3]
    assert history.rounds[0].networks == []
    assert set(history.rounds[2].networks) == {"unstructured@0.5", "1:2", "channel@0.4"}
    assert all(len(r.losses) == len(r.learning_rates) == 6 for r in history.rounds)
    assert set(history.rounds[3].losses[0]) == {"dense", *history.rounds[3].networks}
    assert set(history.rounds[3].metrics) == {"dense", *history.rounds[3].networks}
    assert len(history.alphas) == len(history.merged) == 2


def test_two_runs_with_one_seed_are_identical_and_with_another_are_not() -> None:
    results = []
    for seed in (3, 3, 4):
        torch.manual_seed(len(results))  # what the user draws elsewhere changes nothing
        trainer = tiny_trainer(seed=seed)
        trainer.fit()
        results.append(result(trainer))
    assert_identical(results[0], results[1])
    assert not torch.equal(results[0]["weights"]["model.fc.weight"], results[2]["weights"]["model.fc.weight"])


def test_global_generators_modes_and_threads_are_left_as_they_were() -> None:
    net = tiny_net()
    net.model.eval()
    net.model.bn2.train()
    modes = [m.training for m in net.modules()]
    numpy = np.random.get_state()[1].copy()  # noqa: NPY002 - the global generator is what must not change
    before = torch.get_rng_state(), random.getstate(), torch.get_num_threads()
    trainer = tiny_trainer(net)
    trainer.fit()
    trainer.evaluate(tiny_loaders()[0])
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], numpy)  # noqa: NPY002
    assert random.getstate() == before[1]
    assert torch.get_num_threads() == before[2]
    assert [m.training for m in net.modules()] == modes


# ------------------------------------------------------------------- method


class Watch:
    """Keeps weights and masks at the events that matter."""

    def __init__(self) -> None:
        self.net: cocktail.CocktailNet | None = None
        self.seen: dict[tuple[str, int], dict[str, Tensor]] = {}
        self.masks: dict[int, dict[str, cocktail.Mask]] = {}
        self.rates: dict[int, list[float]] = {}

    def __call__(self, event: ev.Event) -> None:
        assert self.net is not None
        if isinstance(event, ev.RoundStarted):
            self.seen["start", event.round] = weights(self.net)
            self.masks[event.round] = dict(self.net.masks)
        if isinstance(event, ev.EpochEnded):
            self.seen.setdefault((f"epoch {event.epoch}", event.round), weights(self.net))
            self.rates.setdefault(event.round, []).append(event.learning_rate)
        if isinstance(event, ev.RoundEnded):
            self.seen["end", event.round] = weights(self.net)


def watched(**options: Any) -> tuple[cocktail.CoTrainer, Watch]:
    watch = Watch()
    trainer = tiny_trainer(callbacks=[watch], **options)
    watch.net = trainer.net
    trainer.fit()
    return trainer, watch


def test_every_round_rewinds_weights_statistics_and_schedule() -> None:
    trainer, watch = watched(epochs=3, rewind_epoch=2)
    point = watch.seen["epoch 1", 0]  # after two epochs
    for k in (1, 2, 3):
        assert_identical(watch.seen["start", k], point)
        assert watch.rates[k] == watch.rates[0]
    assert not torch.equal(watch.seen["end", 0]["fc.weight"], point["fc.weight"])
    assert trainer.history.rounds[0].learning_rates[-1] < 0.001


def test_rewinding_to_epoch_zero_is_to_the_initial_weights() -> None:
    net = tiny_net()
    initial = weights(net)
    _, watch = watched(net=net, rewind_epoch=0)
    assert_identical(watch.seen["start", 2], initial)


def test_a_rewound_schedule_goes_on_from_the_rewind_point() -> None:
    _, watch = watched(epochs=3, rewind_epoch=1, rewind_schedule=True)
    assert watch.rates[2] == watch.rates[0][1:]


def test_masks_are_made_from_the_weights_that_the_round_before_ended_with() -> None:
    _, watch = watched()
    for k in (1, 2, 3):
        net = tiny_net()
        state = watch.seen["end", k - 1]
        net.model.load_state_dict(state)
        level = {1: "unstructured@0.3", 2: "unstructured@0.5", 3: "unstructured@0.7"}
        previous = watch.masks[k - 1][level[k - 1]] if k > 1 else None
        made = net.make_masks(level[k], previous)
        for name, keep in made.elements.items():
            assert torch.equal(keep, watch.masks[k][level[k]].elements[name])
        channel = [n for n in net.names if n.startswith("channel")]
        seen = {"unstructured": made}
        if k > 1:
            seen["n:m"] = watch.masks[k]["1:2"]
        before = watch.masks[k - 1][channel[k - 2]] if k > 1 else None
        assert torch.equal(net.make_masks(channel[k - 1], before, seen).removed, watch.masks[k][channel[k - 1]].removed)
    # an n:m mask is made on entry, then fixed
    for name, keep in watch.masks[2]["1:2"].elements.items():
        assert torch.equal(keep, watch.masks[3]["1:2"].elements[name])


def test_pretrained_weights_are_the_rewind_point_and_round_zero_is_skipped() -> None:
    net = tiny_net()
    given = weights(net)
    trainer, watch = watched(net=net, start="pretrained", rewind_epoch=None)
    assert [r.round for r in trainer.history.rounds] == [1, 2, 3]
    for k in (1, 2, 3):
        assert_identical(watch.seen["start", k], given)
    fresh = tiny_net()
    expected = fresh.make_masks("unstructured@0.3")
    for name, keep in expected.elements.items():
        assert torch.equal(keep, watch.masks[1]["unstructured@0.3"].elements[name])


def test_fewer_rounds_than_levels_train_several_subnets_in_one() -> None:
    trainer = tiny_trainer(rounds=2)
    trainer.fit()
    trained = {n for r in trainer.history.rounds for n in r.networks}
    assert trained == set(trainer.net.names) - {"dense"}
    assert list(trainer.net.metrics) == trainer.net.names


def test_a_budget_of_steps_is_divided_among_rounds() -> None:
    trainer = tiny_trainer(epochs=None, total_steps=100)
    trainer.fit()
    assert all(len(r.losses) == 5 for r in trainer.history.rounds)  # 4 rounds of 25 steps, 6 in an epoch
    assert trainer.history.steps == 100
    with pytest.raises(TrainingError, match="total_steps=3 is too small: 4 rounds need at least one step each; give"):
        tiny_trainer(epochs=None, total_steps=3)
    with pytest.raises(TrainingError, match=r"give one of epochs, .*; got epochs=2, total_steps=100"):
        tiny_trainer(total_steps=100)


def test_events_come_in_order_and_count_every_step() -> None:
    seen: list[ev.Event] = []
    tiny_trainer(callbacks=[seen.append]).fit()
    kinds = [type(e) for e in seen]
    assert kinds[0] is ev.TrainingStarted
    assert kinds[-1] is ev.Finished
    steps = [e for e in seen if isinstance(e, ev.StepDone)]
    assert [e.done_steps for e in steps] == list(range(1, 49))
    assert {e.total_steps for e in steps} == {48}
    assert kinds.count(ev.RoundStarted) == kinds.count(ev.RoundEnded) == 4
    merging = [e for e in seen if isinstance(e, ev.MergeProgress)]
    assert merging[-1].judged <= merging[-1].total == 3 * (5 + 7)


# --------------------------------------------------------------- what is given


class Sequences:
    """Batches as dicts, from an iterable without a length."""

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(0)
        for _ in range(4):
            tokens = torch.randint(0, 11, (4, 6), generator=generator)
            yield {"input_ids": tokens, "labels": (tokens + 1) % 11}


class LanguageModel(nn.Module):
    """Computes its own loss, as transformers' models do."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 12)
        self.up = nn.Linear(12, 24)
        self.down = nn.Linear(24, 12)
        self.head = nn.Linear(12, 11)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        x = self.embedding(input_ids)
        logits = self.head(x + self.down(F.gelu(self.up(x))))
        if labels is None:
            return {"logits": logits}
        return {"logits": logits, "loss": F.cross_entropy(logits.flatten(0, 1), labels.flatten())}


def test_models_that_return_their_loss_train_from_dicts() -> None:
    torch.manual_seed(0)
    net = cocktail.sparsify(
        LanguageModel(),
        [cocktail.Unstructured(sparsities=[0.3, 0.6]), "2:4"],
        example_kwargs={"input_ids": torch.zeros(1, 6, dtype=torch.long)},
    )
    trainer = cocktail.CoTrainer(
        net,
        Sequences(),
        val_loader=Sequences(),
        epochs=10,
        optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2),
        rounds=cocktail.RoundSettings(alphas=(1.0, 0.5)),
    )
    trainer.fit()
    assert trainer.history.rounds[0].losses[-1]["dense"] < 0.5 * trainer.history.rounds[0].losses[0]["dense"]
    assert all(m < 0 for m in net.metrics.values())  # the negative loss


class Regression(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 16)
        self.second = nn.Linear(16, 16)
        self.last = nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.second(torch.tanh(self.first(x)))))


def regression() -> tuple[cocktail.CocktailNet, list[tuple[Tensor, Tensor]]]:
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Regression()
    net = cocktail.sparsify(model, [cocktail.Unstructured(sparsities=[0.3, 0.6])], example_inputs=(torch.zeros(1, 6),))
    xs = [torch.randn(8, 6, generator=generator) for _ in range(5)]
    return net, [(x, x[:, :2] - x[:, 2:4]) for x in xs]


def test_a_loss_without_soft_targets_asks_for_distill_fn() -> None:
    net, data = regression()
    trainer = cocktail.CoTrainer(net, data, F.mse_loss, val_loader=data, epochs=1)
    with pytest.raises(
        TrainingError, match=r"mse_loss.*DistillationSettings\(loss_fn=.*DistillationSettings\(weight=0\)"
    ):
        trainer.fit()


@pytest.mark.parametrize("settings", [{"loss_fn": F.mse_loss}, {"weight": 0}])
def test_any_loss_trains_with_a_distillation_loss_or_without_distillation(settings: dict[str, Any]) -> None:
    net, data = regression()
    trainer = cocktail.CoTrainer(
        net,
        data,
        F.mse_loss,
        val_loader=data,
        epochs=20,
        rounds=cocktail.RoundSettings(alphas=(1.0, 0.5)),
        distillation=cocktail.DistillationSettings(**settings),
    )
    trainer.fit()
    assert -net.metrics["dense"] < 0.5


def test_metrics_where_less_is_better_choose_the_lesser() -> None:
    def error(output: Tensor, target: Tensor) -> Tensor:
        return (output - target).square().mean(1)

    net, data = regression()
    options: dict[str, Any] = grouped({"distill_weight": 0, "epochs": 5, "alphas": (1.0, 0.6, 0.3)})
    trainer = cocktail.CoTrainer(
        net,
        data,
        F.mse_loss,
        val_loader=data,
        metric=error,
        evaluation=cocktail.EvaluationSettings(metric_mode="min"),
        **options,
    )
    trainer.fit()
    other, _ = regression()
    same = cocktail.CoTrainer(other, data, F.mse_loss, val_loader=data, **options)  # by default the negative loss
    same.fit()
    assert trainer.history.alphas == same.history.alphas
    for name, metric in net.metrics.items():
        assert metric == pytest.approx(-other.metrics[name], rel=1e-5)


def test_any_batch_trains_with_forward_fn() -> None:
    data = tiny_images()
    batches = [(to_float(data.images[i : i + 12]), "a note", data.labels[i : i + 12]) for i in range(0, 48, 12)]

    def forward(model: nn.Module, batch: tuple[Tensor, str, Tensor]) -> tuple[Tensor, Tensor]:
        return model(batch[0]), batch[2]

    options: dict[str, Any] = {"train_loader": batches, "val_loader": batches, "epochs": 1}
    tiny_trainer(forward_fn=forward, **options).fit()
    with pytest.raises(TrainingError, match=r"a tuple of 3.*give forward_fn"):
        tiny_trainer(**options).fit()


def test_losses_that_are_no_scalars_and_losses_that_explode_are_errors() -> None:
    with pytest.raises(TrainingError, match=r"loss_fn must return a scalar.*\(8,\)"):
        tiny_trainer(loss_fn=lambda o, y: F.cross_entropy(o, y, reduction="none")).fit()
    with pytest.raises(TrainingError, match=r"training loss of dense became (nan|inf) in round 0, epoch 0, step 1"):
        tiny_trainer(optimizer=lambda p: torch.optim.SGD(p, lr=1e30)).fit()
    with pytest.raises(TrainingError, match="holds no scalar loss: give loss_fn"):
        tiny_trainer(loss_fn=None).fit()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"val_loader": None}, r"give val_loader, or rounds=RoundSettings\(merge=False\)"),
        ({"epochs": 0}, "epochs must be above 0, and finite, got 0"),
        ({"rewind_epoch": 3}, "rewind_epoch must lie in 0 … 2"),
        ({"rewind_epoch": 2, "rewind_schedule": True}, "rewind_epoch must lie in 0 … 1"),
        ({"start": "middle"}, 'start must be "scratch" or "pretrained"'),
        ({"distill_weight": 2}, "DistillationSettings.weight must be in 0 … 1"),
        ({"alphas": ()}, "alphas must be numbers"),
        ({"metric_mode": "best"}, "metric_mode must be"),
        ({"recalibration_batches": 0}, "recalibration_batches must be at least 1"),
        ({"optimizer": torch.optim.SGD([nn.Parameter(torch.zeros(1))])}, "optimizer must be callable, got SGD: give a"),
        ({"optimizer": lambda p: None}, "must return an Optimizer, got NoneType"),
        ({"schedule": lambda o, s: 3}, "must return a torch learning-rate scheduler, got int"),
        ({"train_loader": iter([1, 2])}, "not iter\\(loader\\)"),
        ({"train_loader": []}, "train_loader has no batches"),
        ({"train_loader": 3}, "must be an iterable of batches, got int"),
        ({"config": {"x": object()}}, "config must be a mapping of JSON values"),
        ({"loss_fn": 3}, "loss_fn must be callable"),
        ({"callbacks": [3]}, "callbacks must all be callable"),
    ],
)
def test_arguments_that_make_no_sense_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        tiny_trainer(**options)


def test_the_net_must_come_from_sparsify() -> None:
    with pytest.raises(TrainingError, match=r"cocktailsdk\.sparsify\(\) returned, got Linear"):
        cocktail.CoTrainer(nn.Linear(2, 2), [], F.cross_entropy)  # type: ignore[arg-type]
