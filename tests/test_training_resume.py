"""A run that was stopped anywhere goes on as if it had never been stopped, bit by bit."""

from __future__ import annotations

import dataclasses
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from training_tiny import (
    assert_identical,
    augment,
    result,
    tiny_images,
    tiny_loaders,
    tiny_net,
    tiny_trainer,
    to_float,
)

import cocktailsdk as cocktail
from cocktailsdk import CocktailNet, TrainingError
from cocktailsdk.training import events as ev
from cocktailsdk.training.recipes import Recipe, recipe_named
from cocktailsdk.training.rivals.alternating import Alternating
from cocktailsdk.training.rivals.phases import Phases


@pytest.fixture(scope="module")
def uninterrupted() -> dict[str, Any]:
    trainer = tiny_trainer()
    trainer.fit()
    return result(trainer)


class StopAt:
    """Interrupts at the n-th event of a kind."""

    def __init__(self, kind: type[ev.Event], n: int, error: type[BaseException] = KeyboardInterrupt) -> None:
        self.kind, self.left, self.error = kind, n, error

    def __call__(self, event: ev.Event) -> None:
        if isinstance(event, self.kind):
            self.left -= 1
            if self.left == 0:
                raise self.error


PLACES = [
    (ev.TrainingStarted, 1),
    (ev.StepDone, 3),  # round 0, mid-epoch
    (ev.EpochEnded, 1),  # the rewind point
    (ev.StepDone, 12),  # the last step of round 0
    (ev.RoundEnded, 1),
    (ev.RoundStarted, 3),  # masks are made, nothing trained
    (ev.StepDone, 33),  # mid-round
    (ev.RoundEnded, 4),
    (ev.MergeStarted, 1),
    (ev.MergeProgress, 7),
    (ev.AlphaChosen, 1),
    (ev.MergeProgress, 20),
    (ev.NetworkFinished, 3),
]


@pytest.mark.parametrize(("kind", "n"), PLACES, ids=lambda v: getattr(v, "__name__", v))
def test_an_interrupted_run_goes_on_identically(
    kind: type[ev.Event], n: int, tmp_path: Path, uninterrupted: dict[str, Any]
) -> None:
    first = tiny_trainer(out_dir=tmp_path, callbacks=[StopAt(kind, n)])
    with pytest.raises(KeyboardInterrupt):
        first.fit()
    assert first.net.active == "dense"
    second = tiny_trainer(tiny_net(seed=9), tmp_path)  # a fresh process builds its model anew
    second.fit()
    assert_identical(result(second), uninterrupted)


FINISHING = dataclasses.replace(recipe_named("paper-finishing"), update="active", statistics="separate")
PHASES = dataclasses.replace(recipe_named("ac/dc"), schedule=Phases((0.2, 0.5, 0.7)))
ALTERNATING = dataclasses.replace(recipe_named("ast"), schedule=Alternating(period=1))
ONE_PATTERN = (cocktail.Unstructured(sparsities=[0.3, 0.5]),)
RECIPES: dict[str, tuple[Recipe, Any]] = {
    **{name: (recipe_named(name), None) for name in ("mutualnet", "refilling", "paper-rotation")},
    "paper-finishing": (FINISHING, None),
    "cocktail": (recipe_named("cocktail"), None),
    "layerwise": (dataclasses.replace(recipe_named("paper"), merging="layerwise"), ONE_PATTERN),
    "gradient": (dataclasses.replace(recipe_named("paper"), merging="gradient"), ONE_PATTERN),
    "imp": (recipe_named("imp"), ONE_PATTERN),
    "ac/dc": (PHASES, (cocktail.Unstructured(sparsities=[0.5]),)),
    "ast": (ALTERNATING, ONE_PATTERN),
}


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_goes_on_identically(name: str, tmp_path: Path) -> None:
    recipe, patterns = RECIPES[name]

    def trainer(seed: int, **options: Any) -> cocktail.CoTrainer:
        return tiny_trainer(tiny_net(seed, patterns), recipe=recipe, epochs=3, alphas=(1.0, 0.5), **options)

    whole = trainer(0)
    whole.fit()
    expected = {**result(whole), "evaluated": whole.evaluate(tiny_loaders()[1])}
    often = len(whole.net.names) + 5 if recipe.rounds == "one" else 31
    for n in range(20):
        run = trainer(n, out_dir=tmp_path, callbacks=[StopAt(ev.Event, often + n % 2)])
        try:
            run.fit()
        except KeyboardInterrupt:
            continue
        break
    assert n > 1
    assert_identical({**result(run), "evaluated": run.evaluate(tiny_loaders()[1])}, expected)
    assert run.parameters_stored == whole.parameters_stored


def test_iterative_pruning_from_pretrained_weights_keeps_them_as_the_dense_network(tmp_path: Path) -> None:
    recipe, patterns = RECIPES["imp"]
    given = {name: tensor.clone() for name, tensor in tiny_net(0, patterns).model.named_parameters()}

    def trainer(**options: Any) -> cocktail.CoTrainer:
        return tiny_trainer(
            tiny_net(0, patterns), recipe=recipe, start="pretrained", epochs=1, rewind_epoch=None, **options
        )

    whole = trainer()
    whole.fit()
    assert all(torch.equal(p, given[name]) for name, p in whole.net.model.named_parameters())
    with pytest.raises(KeyboardInterrupt):
        trainer(out_dir=tmp_path, callbacks=[StopAt(ev.NetworkFinished, 2)]).fit()
    again = trainer(out_dir=tmp_path)
    again.fit()
    assert_identical(result(again), result(whole))


def test_a_run_stopped_many_times_goes_on_identically(tmp_path: Path, uninterrupted: dict[str, Any]) -> None:
    net = tiny_net()
    for n in range(100):
        trainer = tiny_trainer(net, tmp_path, callbacks=[StopAt(ev.Event, 5 + n % 7)])
        try:
            trainer.fit()
        except KeyboardInterrupt:
            continue
        assert n > 5
        break
    assert_identical(result(trainer), uninterrupted)


def test_a_resumed_run_stopped_before_its_first_step_goes_on_identically(
    tmp_path: Path, uninterrupted: dict[str, Any]
) -> None:
    for seed, kind, n in ((0, ev.StepDone, 33), (9, ev.TrainingStarted, 1)):  # the second before its optimizer exists
        with pytest.raises(KeyboardInterrupt):
            tiny_trainer(tiny_net(seed=seed), tmp_path, callbacks=[StopAt(kind, n)]).fit()
    last = tiny_trainer(tiny_net(seed=9), tmp_path)
    last.fit()
    assert_identical(result(last), uninterrupted)


@pytest.mark.parametrize("n", [5, 17, 40])
def test_after_a_crash_the_last_saved_state_goes_on_identically(
    n: int, tmp_path: Path, uninterrupted: dict[str, Any]
) -> None:
    first = tiny_trainer(out_dir=tmp_path, save_seconds=0, callbacks=[StopAt(ev.StepDone, n, RuntimeError)])
    with pytest.raises(RuntimeError):
        first.fit()
    second = tiny_trainer(tiny_net(seed=9), tmp_path)
    second.fit()
    assert_identical(result(second), uninterrupted)


def test_ctrl_c_in_the_middle_of_a_step_finishes_it_and_saves(tmp_path: Path, uninterrupted: dict[str, Any]) -> None:
    calls = 0

    def loss_fn(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 30:
            os.kill(os.getpid(), signal.SIGINT)
        return torch.nn.functional.cross_entropy(output, target)

    loss_fn.__qualname__ = "cross_entropy"
    before = signal.getsignal(signal.SIGINT)
    saved: list[ev.Event] = []
    # events are throttled as they are by default: an interrupt does not wait for one
    first = tiny_trainer(out_dir=tmp_path, loss_fn=loss_fn, event_seconds=3600, callbacks=[saved.append])
    with pytest.raises(KeyboardInterrupt):
        first.fit()
    assert signal.getsignal(signal.SIGINT) is before
    assert isinstance(saved[-1], ev.Saved)
    assert saved[-1].interrupted
    assert not isinstance(saved[-1], ev.Finished)
    second = tiny_trainer(tiny_net(seed=9), tmp_path)
    second.fit()
    assert_identical(result(second), uninterrupted)


def test_training_works_outside_the_main_thread(uninterrupted: dict[str, Any]) -> None:
    trainer = tiny_trainer()
    thread = threading.Thread(target=trainer.fit)
    thread.start()
    thread.join()
    assert_identical(result(trainer), uninterrupted)


def test_a_finished_run_is_loaded_not_trained(tmp_path: Path, uninterrupted: dict[str, Any]) -> None:
    tiny_trainer(out_dir=tmp_path).fit()
    seen: list[ev.Event] = []
    again = tiny_trainer(tiny_net(seed=9), tmp_path, callbacks=[seen.append])
    again.fit()
    assert_identical(result(again), uninterrupted)
    assert [type(e) for e in seen] == [ev.Finished]


def test_a_loader_with_its_own_generator_and_workers_resumes_identically(tmp_path: Path) -> None:
    class Noisy(torch.utils.data.Dataset[tuple[torch.Tensor, int]]):
        data = tiny_images()

        def __len__(self) -> int:
            return len(self.data)

        def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
            return augment(self.data.images[i]), int(self.data.labels[i])

    def run(out_dir: Path, *stops: int) -> dict[str, Any]:
        for stop in (*stops, 0):
            generator = torch.Generator().manual_seed(5)
            loader = torch.utils.data.DataLoader(Noisy(), 8, shuffle=True, generator=generator)
            trainer = tiny_trainer(
                out_dir=out_dir, train_loader=loader, rounds=3, merge=False, callbacks=[StopAt(ev.StepDone, stop)]
            )
            if stop:
                with pytest.raises(KeyboardInterrupt):
                    trainer.fit()
            else:
                trainer.fit()
        return result(trainer)

    assert_identical(run(tmp_path / "a", 9, 5, 11), run(tmp_path / "b"))


def test_adam_and_rewound_schedules_resume_identically(tmp_path: Path) -> None:
    def adam(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=1e-2)

    def run(out_dir: Path | None, stop: int) -> dict[str, Any]:
        options: dict[str, Any] = {"optimizer": adam, "rewind_schedule": True, "out_dir": out_dir, "epochs": 3}
        if stop:
            with pytest.raises(KeyboardInterrupt):
                tiny_trainer(callbacks=[StopAt(ev.StepDone, stop)], **options).fit()
        trainer = tiny_trainer(**options)
        trainer.fit()
        return result(trainer)

    assert_identical(run(tmp_path, 22), run(None, 0))


def test_another_configuration_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        tiny_trainer(out_dir=tmp_path, callbacks=[StopAt(ev.StepDone, 3)]).fit()
    with pytest.raises(TrainingError, match=r"training\.epochs: 2, now 3.*train into another folder"):
        tiny_trainer(out_dir=tmp_path, epochs=3).fit()
    with pytest.raises(TrainingError, match=r"config\.data: null, now \"other\""):
        tiny_trainer(out_dir=tmp_path, config={"data": "other"}).fit()
    with pytest.raises(TrainingError, match=r"optimizer\.groups"):
        tiny_trainer(out_dir=tmp_path, optimizer=lambda p: torch.optim.SGD(p, lr=0.2)).fit()


def test_the_fingerprint_is_that_of_the_configuration() -> None:
    assert tiny_trainer().fingerprint == tiny_trainer(tiny_net(seed=3)).fingerprint
    for other in ({"epochs": 3}, {"seed": 1}, {"distill_weight": 0.4}, {"config": {"a": 1}}, {"rounds": 2}):
        assert tiny_trainer(**other).fingerprint != tiny_trainer().fingerprint


def test_a_damaged_state_falls_back_to_the_one_before(tmp_path: Path, uninterrupted: dict[str, Any]) -> None:
    with pytest.raises(KeyboardInterrupt):
        tiny_trainer(out_dir=tmp_path, callbacks=[StopAt(ev.StepDone, 33)]).fit()
    states = sorted((tmp_path / "state").glob("state-*.pt"))
    assert len(states) == 2
    data = bytearray(states[-1].read_bytes())
    data[len(data) // 2] ^= 1
    states[-1].write_bytes(bytes(data))
    trainer = tiny_trainer(tiny_net(seed=9), tmp_path)
    trainer.fit()
    assert_identical(result(trainer), uninterrupted)


def test_damaged_states_are_errors_that_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        tiny_trainer(out_dir=tmp_path, callbacks=[StopAt(ev.StepDone, 33)]).fit()
    (masks,) = (tmp_path / "state").glob("masks-01-*.safetensors")
    whole = masks.read_bytes()
    masks.write_bytes(whole[:-1])
    with pytest.raises(TrainingError, match=r"no state in .* can be gone on from .*masks-01.*checksum.*start anew"):
        tiny_trainer(out_dir=tmp_path).fit()
    masks.unlink()
    with pytest.raises(TrainingError, match=r"masks-01.*is missing.*start anew"):
        tiny_trainer(out_dir=tmp_path).fit()
    for state in (tmp_path / "state").glob("state-*.pt"):
        state.write_bytes(state.read_bytes()[:-1])
    with pytest.raises(TrainingError, match=r"state-\d+.pt: its checksum is wrong; state-\d+.pt: its checksum"):
        tiny_trainer(out_dir=tmp_path).fit()


def test_a_folder_keeps_two_states_and_no_leftovers(tmp_path: Path) -> None:
    tiny_trainer(out_dir=tmp_path, save_seconds=0).fit()
    names = sorted(p.name for p in (tmp_path / "state").iterdir())
    assert sum(n.startswith("state-") for n in names) == 2
    assert not [n for n in names if n.endswith(".tmp")]
    once = [n.rpartition("-")[0] for n in names if n.endswith(".safetensors")]
    assert once == ["masks-01", "masks-02", "masks-03", "rewind", "round-01", "round-02", "round-03"]


def test_interrupted_without_a_folder_the_net_is_dense_and_whole() -> None:
    net: CocktailNet = tiny_net()
    with pytest.raises(KeyboardInterrupt):
        tiny_trainer(net, callbacks=[StopAt(ev.MergeProgress, 3)]).fit()
    assert net.active == "dense"
    train, _ = tiny_loaders()
    assert net(to_float(train.data.images)).isfinite().all()
