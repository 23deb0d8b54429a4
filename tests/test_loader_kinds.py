"""Loaders of every kind: nothing is assumed but that they are iterable, and what cannot work is said at the start."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from training_tiny import assert_identical, result, tiny_net, tiny_trainer

import cocktailsdk as cocktail
from cocktailsdk.errors import TrainingError
from cocktailsdk.training import events as ev
from cocktailsdk.training.data.batches import CachedBatches, draw, draw_groups
from cocktailsdk.training.data.loader_state import epoch_length, generator_states, set_epoch, set_generator_states

ALWAYS = settings(deadline=None, derandomize=True, max_examples=40)
CPU = torch.device("cpu")
N = 4


def data(n: int = 8 * N) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(torch.rand(n, 1, 8, 8, generator=generator) - 0.5, torch.arange(n) % 4)


def batches() -> list[tuple[Tensor, Tensor]]:
    return [tuple(b) for b in DataLoader(data(), 8)]  # type: ignore[misc]


class Streamed(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(data())


class Each:
    """Iterable, and nothing else; with a generator of its own, whose kind is asked for."""

    def __init__(self, kind: str = "none") -> None:
        self.inner = batches()
        self.rng: Any = {
            "none": None,
            "numpy": np.random.default_rng(3),
            "legacy": np.random.RandomState(3),
            "python": random.Random(3),
            "torch": torch.Generator().manual_seed(3),
        }[kind]

    def order(self) -> list[int]:
        if isinstance(self.rng, random.Random):
            return self.rng.sample(range(N), N)
        if isinstance(self.rng, torch.Generator):
            return torch.randperm(N, generator=self.rng).tolist()
        return list(range(N)) if self.rng is None else self.rng.permutation(N).tolist()

    def __iter__(self) -> Iterator[Any]:
        for i in self.order():
            yield self.inner[i]


class Restarts:
    """Its own iterator, which begins anew with every pass, as Lightning's CombinedLoader."""

    def __init__(self) -> None:
        self.inner, self.at = batches(), N

    def __len__(self) -> int:
        if self.at == N:
            raise RuntimeError("Please call iter(loader) first.")
        return N

    def __iter__(self) -> Restarts:
        self.at = 0
        return self

    def __next__(self) -> Any:
        if self.at >= N:
            raise StopIteration
        self.at += 1
        return self.inner[self.at - 1]


class Reusing:
    """Writes every batch into the memory of the one before."""

    def __init__(self) -> None:
        self.inner = batches()

    def __iter__(self) -> Iterator[Any]:
        x, y = (torch.empty_like(tensor) for tensor in self.inner[0])
        for image, label in self.inner:
            yield x.copy_(image), y.copy_(label)


class Endless:
    def __iter__(self) -> Iterator[Any]:
        return itertools.cycle(batches())


class Shrinking(Each):
    """Gives fewer batches with every pass."""

    passes = 0

    def __iter__(self) -> Iterator[Any]:
        self.passes += 1
        return itertools.islice(super().__iter__(), max(1, N - self.passes))


class ClosesBadly(Each):
    def __iter__(self) -> Iterator[Any]:
        try:
            yield from super().__iter__()
        finally:
            raise OSError("cannot close")


class Hostile(Each):
    """Raises for whatever is asked of it but its batches."""

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(f"do not ask for {name}")

    def __len__(self) -> int:
        raise RuntimeError("unknown")


def prepared() -> Any:
    configuration = DataLoaderConfiguration(use_seedable_sampler=True)
    return Accelerator(cpu=True, dataloader_config=configuration).prepare(DataLoader(data(), 8, shuffle=True))


class Late(Each):
    """Makes its generator in its first pass."""

    def __init__(self) -> None:
        super().__init__("none")

    def order(self) -> list[int]:
        self.rng = self.rng or np.random.default_rng(3)
        return self.rng.permutation(N).tolist()


KINDS: dict[str, Any] = {
    "list": batches,
    "tuple": lambda: tuple(batches()),
    "DataLoader": lambda: DataLoader(data(), 8),
    "shuffled": lambda: DataLoader(data(), 8, shuffle=True),
    "with a generator": lambda: DataLoader(data(), 8, shuffle=True, generator=torch.Generator().manual_seed(1)),
    "IterableDataset": lambda: DataLoader(Streamed(), 8),
    "iterable alone": Each,
    "numpy generator": lambda: Each("numpy"),
    "legacy numpy generator": lambda: Each("legacy"),
    "random.Random": lambda: Each("python"),
    "torch generator": lambda: Each("torch"),
    "its own iterator": Restarts,
    "reused memory": Reusing,
    "hostile": Hostile,
    "prepared by Accelerate": prepared,
    "generator made in the first pass": Late,
}
ODD: dict[str, Any] = {"endless": Endless, "shrinking": Shrinking, "closes badly": ClosesBadly}


def run(loader: Any, out: Path | None = None, **options: Any) -> cocktail.CoTrainer:
    # another loader is measured by: a pass over the same one would make its generators before a state is read
    held = {"val_loader": batches()[:2]}
    settings = {"rounds": 1, "merge": False, "epochs": 2, "rewind_epoch": 1, **held, **options}
    return tiny_trainer(tiny_net(patterns=["1:2"]), out, recipe="cocktail", train_loader=loader, **settings)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_with_any_loader_ends_as_if_it_had_never_been_stopped(kind: str, tmp_path: Path) -> None:
    whole = run(KINDS[kind]())
    whole.fit()
    left = [6]  # in the second epoch

    def crash(event: ev.Event) -> None:
        left[0] -= isinstance(event, ev.StepDone)
        if not left[0]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(KINDS[kind](), tmp_path, callbacks=[crash]).fit()
    again = run(KINDS[kind](), tmp_path)
    again.fit()
    assert_identical(result(again), result(whole))


@pytest.mark.parametrize("kind", ODD)
def test_odd_loaders_train_to_the_end(kind: str) -> None:
    held = batches()[:2]
    steps = 1 if kind == "closes badly" else 3  # a pass goes on in the next epoch, and must not come to its end
    trainer = run(ODD[kind](), val_loader=held, steps_per_epoch=steps, epochs=1)
    if kind == "closes badly":  # at the end of a pass nobody can tell that from a loader that fails
        with pytest.raises(TrainingError, match="cannot close"):
            run(ODD[kind](), val_loader=held).fit()
    trainer.fit()
    assert set(trainer.net.metrics) == {"dense", *trainer.net.masks}


@pytest.mark.parametrize("kind", KINDS)
def test_the_loop_finishes_and_nets_recalibrate_with_any_loader(kind: str) -> None:
    net = tiny_net(patterns=["1:2"])
    loop = cocktail.CoLoop(net, steps=6)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    loader = KINDS[kind]()
    for x, y in loop.batches(loader):
        with loop.step((x, y)) as step:
            output = net.model(x)
            optimizer.zero_grad()
            step.loss(F.cross_entropy(output, y), output, y).backward()
        optimizer.step()
    loop.finish(loader, loader)
    net.recalibrate("1:2", loader)
    assert set(net.metrics) == {"dense", "1:2"}


class Spent:
    """Every pass goes on with the same generator."""

    def __init__(self) -> None:
        self.generator_of_batches = (batch for batch in batches())

    def __iter__(self) -> Iterator[Any]:
        return self.generator_of_batches


class SpentData(IterableDataset[Any]):
    def __init__(self) -> None:
        self.examples = iter(data())

    def __iter__(self) -> Iterator[Any]:
        return self.examples


@pytest.mark.parametrize(
    "loader",
    [
        lambda: iter(batches()),
        lambda: (batch for batch in batches()),
        lambda: itertools.cycle(batches()),
        lambda: zip(*zip(*batches(), strict=True), strict=True),
        lambda: iter(DataLoader(data(), 8)),
        Spent,
        lambda: DataLoader(SpentData(), 8),
    ],
)
@pytest.mark.parametrize("steps", [None, N])
def test_what_can_be_gone_through_only_once_is_refused_at_the_start(loader: Any, steps: int | None) -> None:
    with pytest.raises(TrainingError, match="iterable again and again") as caught:
        run(loader(), val_loader=None, steps_per_epoch=steps)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "loader", [lambda: iter(batches()), lambda: (b for b in batches()), lambda: iter(DataLoader(data(), 8))]
)
def test_held_out_batches_that_can_be_gone_through_only_once_are_refused_at_the_start(loader: Any) -> None:
    with pytest.raises(TrainingError, match="val_loader must be iterable again and again"):
        run(batches(), val_loader=loader())


@pytest.mark.parametrize("loader", [[], 7, None, DataLoader(data(4), 8, drop_last=True)])
def test_loaders_without_batches_are_refused(loader: Any) -> None:
    with pytest.raises(TrainingError, match="train_loader"):
        run(loader, val_loader=None)


def test_a_loader_that_fails_while_it_is_counted_is_named() -> None:
    class Failing:
        def __iter__(self) -> Iterator[Any]:
            raise OSError("the disk\nis gone")

    with pytest.raises(TrainingError, match=r"train_loader raised OSError \(the disk is gone\)"):
        run(Failing())


class Wrapped:
    """A wrapper as people write them, of which one shows the inner loader's attributes and another hides them."""

    def __init__(self, inner: Any, shows: bool) -> None:
        self.wrapped, self.shows = inner, shows

    def __iter__(self) -> Iterator[Any]:
        yield from self.wrapped

    def __getattr__(self, name: str) -> Any:
        if name == "wrapped" or not self.__dict__.get("shows"):
            raise AttributeError(name)
        return getattr(self.wrapped, name)


wrappers = st.recursive(
    st.sampled_from(sorted(KINDS)).map(lambda kind: KINDS[kind]),
    lambda inner: st.tuples(inner, st.booleans()).map(lambda pair: lambda: Wrapped(pair[0](), pair[1])),
    max_leaves=3,
)


@ALWAYS
@given(wrappers, st.integers(1, 4))
def test_passes_with_one_key_are_equal_and_leave_the_loader_where_it_was(make: Any, size: int) -> None:
    loader = make()
    assert epoch_length(loader, None) == N
    held = CachedBatches(loader, (0, "held out"), CPU, limit=3, cache_bytes=0)
    before = repr(generator_states(loader))
    first = list(held)
    assert before == "{}" or repr(generator_states(loader)) == before  # what is hidden cannot be put back
    kept = CachedBatches(loader, (0, "kept"), CPU, limit=3)
    assert_equal(list(kept), list(kept))
    if not reuses(loader):
        assert_equal(first, list(held))
    states = generator_states(loader)
    set_epoch(loader, 1)
    one = [copied(b) for group in draw_groups(loader, (1,), N, size) for b in group]
    set_generator_states(loader, states)
    set_epoch(loader, 1)
    assert_equal(one, [copied(b) for b in draw(loader, (1,))])


def reuses(loader: Any) -> bool:
    return isinstance(loader, Reusing) or (isinstance(loader, Wrapped) and reuses(loader.wrapped))


def copied(batch: Any) -> list[Tensor]:
    return [tensor.clone() for tensor in batch]


def assert_equal(one: list[Any], other: list[Any]) -> None:
    assert len(one) == len(other)
    assert all(torch.equal(a, b) for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True))


def test_states_of_generators_survive_a_file(tmp_path: Path) -> None:
    for kind in ("numpy", "legacy", "python", "torch"):
        loader = Each(kind)
        list(loader)
        torch.save(generator_states(loader), tmp_path / "state.pt")
        expected = [loader.order(), loader.order()]
        other = Each(kind)
        set_generator_states(other, torch.load(tmp_path / "state.pt", weights_only=True))
        assert [other.order(), other.order()] == expected


def test_states_that_do_not_fit_are_left_alone() -> None:
    loader = Each("torch")
    set_generator_states(loader, {"rng": {"x": 1}, "other": torch.zeros(3)})
    set_generator_states(loader, [])
    assert loader.order() == Each("torch").order()


def test_a_loop_does_not_take_a_batch_in_reused_memory_for_the_one_before() -> None:
    def trained(loader: Any) -> dict[str, Tensor]:
        net = tiny_net(patterns=["1:2"])
        torch.manual_seed(0)
        loop = cocktail.CoLoop(net, steps=10)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        while not loop.finished:
            for x, y in loader:
                if loop.finished:
                    break
                with loop.step((x, y)) as step:
                    output = net.model(x)
                    optimizer.zero_grad()
                    step.loss(F.cross_entropy(output, y), output, y).backward()
                optimizer.step()
        return {name: value.clone() for name, value in net.state_dict().items()}

    expected = trained(batches())
    for name, value in trained(Reusing()).items():
        assert torch.equal(value, expected[name]), name
