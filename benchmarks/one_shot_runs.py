"""The runs of the one-shot comparison: subnetworks by scores of the SDK, and by plain versions of published methods."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from one_shot_reference import (
    Sparsity,
    drop_blocks_by_cosine,
    drop_blocks_by_loss,
    narrow_mlps,
    prune_linears,
    sparsegpt,
    wanda,
)
from one_shot_tasks import Batch, Place, Size, Task
from result_rows import Row, provenance
from torch import nn

import cocktailsdk as cocktail
from cocktailsdk.patterns import DENSE


@dataclass(frozen=True)
class Measured:
    """What a run found.

    Attributes:
        values: The task's metric by network.
        cpu_seconds: Of scoring and reconstructing, without loading and measuring.
        details: What else the row has.
    """

    values: Mapping[str, float]
    cpu_seconds: float
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Run(ABC):
    """A run of the comparison. Subclasses make it.

    Attributes:
        method: In tables.
        subnets: The networks that are measured.
        size: Of calibration; ``None`` without data.
    """

    method: str
    subnets: tuple[str, ...]
    size: Size | None = None

    @property
    def key(self) -> str:
        """Identifies the run within its task."""
        return " ".join([self.method, *self.subnets, *([str(self.size)] if self.size else [])])

    @property
    def reconstructed(self) -> bool:
        """Whether weights are changed too, besides those that go."""
        return False

    @abstractmethod
    def measure(self, task: Task, place: Place) -> Measured:
        """Make the run."""

    def row(self, task: Task, place: Place) -> Row:
        """Make the run: its row for the results."""
        measured = self.measure(task, place)
        return {
            "task": task.name,
            "key": self.key,
            "method": self.method,
            "size": str(self.size) if self.size else "",
            "reconstructed": self.reconstructed,
            "values": dict(measured.values),
            "cpu_seconds": round(measured.cpu_seconds, 1),
            "settings": dict(measured.details),
            **provenance(),
        }

    def batches(self, task: Task, place: Place) -> list[Batch] | None:
        """The calibration batches, if the run has any."""
        return None if self.size is None else task.calibration(place, self.size)


@dataclass(frozen=True, kw_only=True)
class Dense(Run):
    """The model as it is."""

    method: str = DENSE
    subnets: tuple[str, ...] = (DENSE,)

    def measure(self, task: Task, place: Place) -> Measured:
        """Measure it."""
        return Measured({DENSE: task.measure(task.model(place), place)}, 0.0)


@dataclass(frozen=True, kw_only=True)
class Reference(Run):
    """One subnetwork by a plain version of a published method.

    Attributes:
        of: The method: a key of :data:`REFERENCES`.
    """

    of: str
    method: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "method", f"reference {self.of}")

    @property
    def reconstructed(self) -> bool:
        """SparseGPT changes the weights that stay."""
        return self.of == "sparsegpt"

    def measure(self, task: Task, place: Place) -> Measured:
        """Prune a copy of the model and measure it."""
        (subnet,) = self.subnets
        model, batches = task.model(place), self.batches(task, place)
        began = time.process_time()
        dropped = REFERENCES[self.of](model, batches or [], subnet)
        seconds = time.process_time() - began
        return Measured({subnet: task.measure(model, place)}, seconds, {"dropped": dropped} if dropped else {})


def _sparsity(subnet: str) -> Sparsity:
    if ":" in subnet:
        n, m = map(int, subnet.split(":"))
        return Sparsity(1 - n / m, m)
    return Sparsity(_level(subnet))


def _level(subnet: str) -> float:
    return float(subnet.partition("@")[2])


def _blocks(model: nn.Module, subnet: str) -> int:
    return round(_level(subnet) * len(model.get_submodule("model.layers")))  # type: ignore[arg-type]  # a ModuleList


REFERENCES: Mapping[str, Any] = {
    "wanda": lambda model, batches, subnet: prune_linears(model, batches, wanda, _sparsity(subnet)),
    "sparsegpt": lambda model, batches, subnet: prune_linears(model, batches, sparsegpt, _sparsity(subnet)),
    "activation": lambda model, batches, subnet: narrow_mlps(model, batches, _level(subnet)),
    "cosine": lambda model, batches, subnet: drop_blocks_by_cosine(model, batches, _blocks(model, subnet)),
    "loss": lambda model, batches, subnet: drop_blocks_by_loss(model, batches[:1], _blocks(model, subnet)),
}
"""By method ``prune(model, batches, subnet)``, which changes the model in place. By loss, every candidate needs a pass
of its own, so one batch of eight rows decides."""


@dataclass(frozen=True, kw_only=True)
class Ours(Run):
    """Subnetworks of the SDK, all of one net.

    Attributes:
        score: A score's name, or names by pattern.
        sequential: Whether a block's inputs are those that the pruned blocks before it give.
        repaired: Whether each subnetwork is reconstructed after it was scored.
    """

    score: str | tuple[tuple[str, str], ...] = "magnitude"
    sequential: bool = False
    repaired: bool = False
    method: str = ""

    def __post_init__(self) -> None:
        score = self.score if isinstance(self.score, str) else " ".join(f"{p}={s}" for p, s in self.score)
        options = [", block by block"] * self.sequential + [", reconstructed"] * self.repaired
        object.__setattr__(self, "method", "".join([score, *options]))

    @property
    def reconstructed(self) -> bool:
        """As asked for."""
        return self.repaired

    def measure(self, task: Task, place: Place) -> Measured:
        """Score, reconstruct and measure each subnetwork."""
        batches = self.batches(task, place)
        began = time.process_time()
        net = self._net(task, place, batches)
        seconds = time.process_time() - began
        values, sparsity = {}, {}
        for name in (n for n in net.names if n != DENSE):
            sparsity[name] = net.subnet(name).sparsity
            began = time.process_time()
            plain = cocktail.reconstruct(net, name, batches or []) if self.repaired else None
            seconds += time.process_time() - began
            values[name] = _plain_value(plain, task, place) if plain is not None else _value(net, name, task, place)
        return Measured(values, seconds, {"sparsity": sparsity})

    def _net(self, task: Task, place: Place, batches: list[Batch] | None) -> cocktail.CocktailNet:
        score = self.score if isinstance(self.score, str) else dict(self.score)
        return cocktail.sparsify(
            task.model(place),
            self.subnets,
            task.example(place),
            score=score,
            calibration=batches,
            loss_fn=task.loss_fn,
            sequential=self.sequential,
        )


def _value(net: cocktail.CocktailNet, name: str, task: Task, place: Place) -> float:
    if batches := task.statistics(place):
        net.recalibrate(name, batches)
    with net.using(name):
        return task.measure(net.model, place)


def _plain_value(model: nn.Module, task: Task, place: Place) -> float:
    task.finish(model, place)
    return task.measure(model, place)
