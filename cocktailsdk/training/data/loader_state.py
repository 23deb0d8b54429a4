"""The random state that a loader keeps for itself, as far as it can be seen, and whether it can be gone through again.

Nothing is assumed of a loader but that it is iterable. What it draws from the global generators is repeatable, since
these are seeded before each batch. Generators of its own are looked for in its attributes and in those of its parts
(samplers, data set); those found are put back, and those that a loader makes, drops or hides are its own business.
``set_epoch`` is called where a loader or a part of it has it, so that shufflers which count epochs repeat too.
"""

from __future__ import annotations

import logging
import random
import time
import types
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from ...errors import TrainingError
from ...utils.blame import blamed

__all__ = [
    "attribute",
    "epoch_length",
    "generator_states",
    "loader_length",
    "make_generators",
    "refuse_spent",
    "set_epoch",
    "set_generator_states",
]

log = logging.getLogger(__name__)

FIRST = ("generator", "sampler", "batch_sampler")
"""Attributes in which generators are looked for first."""
DEPTH, MOST = 4, 256
"""How far from the loader, and in how many objects, generators are looked for."""
_CLOSED = (str, bytes, int, float, complex, Tensor, np.ndarray, nn.Module, type, types.ModuleType, types.FunctionType)

States = dict[str, Any]


def attribute(thing: Any, name: str) -> Any:
    """An attribute; ``None`` where there is none, or it raises."""
    try:
        return getattr(thing, name, None)
    except Exception:
        return None


def _generators(loader: Any) -> dict[str, Any]:
    """A loader's own random generators by the path of attributes that leads to them, each once."""
    found: dict[str, Any] = {}
    seen: set[int] = set()
    queue: list[tuple[str, Any, int]] = [("", loader, 0)]
    while queue and len(seen) < MOST:
        path, thing, depth = queue.pop(0)
        if thing is None or isinstance(thing, _CLOSED) or id(thing) in seen:
            continue
        seen.add(id(thing))
        if isinstance(thing, torch.Generator | np.random.Generator | np.random.RandomState | random.Random):
            found[path] = thing
        elif depth < DEPTH:
            queue += [(f"{path}.{name}".lstrip("."), value, depth + 1) for name, value in _parts(thing)]
    return found


def _parts(thing: Any) -> list[tuple[str, Any]]:
    own = attribute(thing, "__dict__")
    first = {name: attribute(thing, name) for name in FIRST}
    more = list(own.items()) if isinstance(own, dict) else []
    # what a pass leaves behind (a DataLoader's persistent workers) is not the loader's state
    return [*first.items(), *((name, value) for name, value in more if name not in first and name != "_iterator")]


def generator_states(loader: Any) -> States:
    """States of the loader's own random generators (its samplers' included), as tensors and plain values."""
    return {path: _state(generator) for path, generator in _generators(loader).items()}


def make_generators(loader: Any, states: Any) -> None:
    """Draw one batch where a loader makes its generators in its first pass, so that their states can be put back.

    Args:
        loader: Any iterable.
        states: From :func:`generator_states`, of the same loader in another process.
    """
    if not isinstance(states, Mapping) or states.keys() <= _generators(loader).keys():
        return
    try:
        batches = iter(loader)
        next(batches, None)
        if isinstance(batches, Generator):
            batches.close()
    except Exception as error:  # the run meets it again, where it can say which batch it was
        log.debug("a loader raised %s for its first batch", error)


def set_generator_states(loader: Any, states: Mapping[str, Any] | Sequence[Tensor]) -> None:
    """Put the loader's own generators where they were; those that are not there now, or were not then, are left alone.

    Args:
        loader: Any iterable.
        states: From :func:`generator_states`; or a list of states of torch generators, as release 0.1 saved it.
    """
    now = _generators(loader)
    if not isinstance(states, Mapping):
        theirs = [path for path, generator in now.items() if isinstance(generator, torch.Generator)]
        states = dict(zip(theirs, states, strict=False))
    for path, state in states.items():
        if path in now:
            _set_state(now[path], state)


def _state(generator: Any) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, random.Random):
        return [generator.getstate()]
    if isinstance(generator, np.random.RandomState):
        return _plain(generator.get_state(legacy=False))
    return _plain(generator.bit_generator.state)


def _set_state(generator: Any, state: Any) -> None:
    if isinstance(generator, torch.Generator):
        if isinstance(state, Tensor):
            generator.set_state(state)
    elif isinstance(generator, random.Random):
        if isinstance(state, list):
            version, words, gauss = state[0]
            generator.setstate((version, tuple(words), gauss))
    elif isinstance(state, dict):
        state = _arrays(state)
        if isinstance(generator, np.random.RandomState):
            generator.set_state(state)
        else:
            generator.bit_generator.state = state


def _plain(value: Any) -> Any:
    """Without NumPy's types, which a run's state cannot hold."""
    if isinstance(value, Mapping):
        return {key: _plain(v) for key, v in value.items()}
    if isinstance(value, np.ndarray):
        return {"dtype": value.dtype.str, "values": value.tolist()}
    return value.item() if isinstance(value, np.generic) else value


def _arrays(value: Any) -> Any:
    if isinstance(value, Mapping):
        if set(value) == {"dtype", "values"}:
            return np.array(value["values"], dtype=value["dtype"])
        return {key: _arrays(v) for key, v in value.items()}
    return value


def set_epoch(loader: Any, epoch: int) -> None:
    """Tell a loader and its parts, which shuffle by the epoch's number, which it is."""
    batches = attribute(loader, "batch_sampler")
    for thing in (
        loader,
        attribute(loader, "sampler"),
        batches,
        attribute(batches, "sampler"),
        attribute(loader, "dataset"),
    ):
        if thing is not None and callable(told := attribute(thing, "set_epoch")):
            told(epoch)


def epoch_length(loader: Iterable[Any], steps: int | None) -> int:
    """Mini-batches of an epoch: as given, as the loader says, or else counted by going through it once.

    Raises:
        TrainingError: For an empty loader, and for one that can be gone through only once.
    """
    if not isinstance(loader, Iterable):
        raise TrainingError(f"train_loader must be an iterable of batches, got {type(loader).__name__}")
    refuse_spent(loader, "train_loader")
    length = loader_length(loader)
    steps = length if steps is None else steps
    states = generator_states(loader)
    hint = "give batches=BatchSettings(steps_per_epoch=...) if it has no length"
    with blamed("train_loader", lambda: "when its batches were counted", hint):
        if _one_iterator(loader):
            counted = _count(loader, steps)
            if counted and next(iter(loader), None) is None:
                raise _spent(loader)
            steps = counted if steps is None else steps
        elif steps is None:
            steps = _count(loader, None)
    set_generator_states(loader, states)
    if steps < 1 or length == 0:
        raise TrainingError(
            "train_loader has no batches: an epoch needs at least one (is batch_size with drop_last "
            "larger than the data?)"
        )
    return steps


def refuse_spent(loader: Any, name: str) -> None:
    """Refuse what can be gone through only once, as far as its type says so: generators, ``iter(list)``, ``zip``, …

    Raises:
        TrainingError: It can.
    """
    once = ("builtins", "itertools", "torch.utils.data.dataloader")
    if isinstance(loader, Iterator) and type(loader).__module__ in once:
        raise _spent(loader, name)


def loader_length(loader: Any) -> int | None:
    """How many batches a loader says that it has; ``None`` where it cannot tell."""
    try:
        return len(loader)
    except Exception:  # a loader may raise what it likes where it cannot tell
        return None


def _one_iterator(loader: Any) -> bool:
    """Whether every pass gets the same iterator, which may then be spent after the first."""
    if isinstance(loader, DataLoader):  # whose iterators may start processes
        data = loader.dataset
        return isinstance(data, IterableDataset) and not loader.num_workers and _one_iterator(data)
    if isinstance(loader, Sequence):
        return False
    return iter(loader) is iter(loader)


def _count(loader: Iterable[Any], most: int | None) -> int:
    began, told, count = time.monotonic(), False, 0
    for count, _ in enumerate(loader, 1):
        if count == most:
            break
        if not told and time.monotonic() - began > 30:
            told = True
            log.warning(
                "train_loader has no length, so its batches are counted: %d so far; give "
                "batches=BatchSettings(steps_per_epoch=...) if it is long or never ends",
                count,
            )
    return count


def _spent(loader: Any, name: str = "train_loader") -> TrainingError:
    return TrainingError(
        f"{name} must be iterable again and again, but a {type(loader).__name__} is spent after one epoch; "
        "give the loader itself, not iter(loader) or a generator"
    )
