"""A run in progress: what its phases share."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

from ..masks import Mask
from ..net import CocktailNet
from ..patterns.base import Subnet
from .batches import HeldBatches, generator_states, set_generator_states
from .distill import Classes
from .events import Event, Saved
from .history import History, Position
from .interrupt import Interrupts
from .metrics import MetricFn, Score, mean_score
from .optimization import Optimization
from .options import Options
from .randomness import seed_everything
from .state import Store

__all__ = ["Session", "load_tensors", "model_tensors"]

log = logging.getLogger(__name__)


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer by name, detached, each once."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor.detach() for name, tensor in named}


@torch.no_grad()
def load_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy what :func:`model_tensors` gave back into place."""
    for name, tensor in model_tensors(model).items():
        tensor.copy_(tensors[name])


@dataclass
class Session:
    """What the phases of a run share.

    Attributes:
        net: The networks.
        options: What is asked for.
        plan: The subnets of every round, by pattern.
        train_loader: As given.
        recalibration: Training batches for the batch-norm statistics.
        held_out: Batches of ``val_loader``; ``None`` without one.
        metric: The user's, or the one found.
        classes: Where the model's output holds logits.
        store: Where results go.
        interrupts: Whether the user asked to stop.
        device: Of the model.
        first_generators: States of the training loader's own generators when the run began.
        generators: The same at the start of the epoch.
        position: Where the run stands.
        history: What came out of it.
        optimization: Optimizer and schedule of the current round.
        losses: By network the sum of this epoch's losses and their number.
        judged: What merging has judged and still needs, by share, network and part of the held-out set.
        held_order: Held-out batches as merging goes through them; ``None`` where it takes them as they are.
        held_examples: The order of examples in them.
        held_scores: Scores in them.
        remade: Subnets whose masks were made anew while the round trained.
        gradients: Of the step before, where the recipe corrects by them.
        rewound: State of optimizer and schedule at the rewind point, where they are rewound as well.
        resumed: The same of the round that is gone on with.
    """

    net: CocktailNet
    options: Options
    plan: Sequence[Mapping[str, tuple[Subnet, ...]]]
    train_loader: Iterable[Any]
    recalibration: HeldBatches
    held_out: HeldBatches | None
    metric: MetricFn
    classes: Classes | None
    store: Store
    interrupts: Interrupts
    device: torch.device
    first_generators: list[Tensor]
    generators: list[Tensor]
    position: Position
    history: History = field(default_factory=History)
    optimization: Optimization | None = None
    losses: dict[str, Tensor] = field(default_factory=dict)
    judged: dict[tuple[float, tuple[str, int]], Score] = field(default_factory=dict)
    held_order: list[Any] | None = None
    held_examples: Tensor | None = None
    held_scores: int = 0
    remade: set[str] = field(default_factory=set)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    rewound: dict[str, Any] | None = None
    resumed: dict[str, Any] | None = None
    _since: float = field(default_factory=time.monotonic)
    _saved: float = field(default_factory=time.monotonic)
    _told: float = 0.0

    def emit(self, event: Event) -> None:
        """Tell the callbacks. Only where the run can be resumed: an interrupt here saves, then stops the run."""
        try:
            for callback in self.options.callbacks:
                callback(event)
            if self.interrupts.requested:
                raise KeyboardInterrupt
        except KeyboardInterrupt:
            self.save(interrupted=True)
            raise

    def due(self) -> bool:
        """Whether it is time for a throttled event, or an interrupt waits for one."""
        now = time.monotonic()
        if now - self._told < self.options.event_seconds and not self.interrupts.requested:
            return False
        self._told = now
        return True

    def save_if_due(self) -> None:
        """Save where the last save is old enough."""
        if time.monotonic() - self._saved >= self.options.save_seconds:
            self.save()

    def save(self, *, interrupted: bool = False) -> None:
        """Write the run's state."""
        now = time.monotonic()
        self.history.seconds += now - self._since
        self._since = now
        path = self.store.save(self._state())
        self._saved = time.monotonic()
        if path is None:
            return
        event = Saved(path, interrupted)
        if not interrupted:
            self.emit(event)
            return
        log.info("interrupted; the same call goes on from %s", path)
        for callback in self.options.callbacks:
            callback(event)

    def _state(self) -> dict[str, Any]:
        finished = self.position.phase == "done"
        tracked = self.options.recipe.statistics == "separate"
        return {
            "position": asdict(self.position),
            "history": self.history.to_dict(),
            "classes": None if self.classes is None else asdict(self.classes),
            "first_generators": self.first_generators,
            "generators": self.generators,
            "losses": _cpu(self.losses),
            "judged": [
                [alpha, *cell, str(score.value), None if score.maximum is None else str(score.maximum)]
                for (alpha, cell), score in self.judged.items()
            ],
            "held_examples": self.held_examples,
            "held_scores": self.held_scores,
            "masks": pack_masks({name: self.net.masks[name] for name in sorted(self.remade)}),
            "gradients": _cpu(self.gradients),
            "rewound": _cpu(self.rewound),
            "model": _cpu(model_tensors(self.net.model)),
            "optimization": self.optimization_state(),
            "statistics": _cpu({k: dict(v) for k, v in self.net.statistics.items()}) if finished or tracked else {},
            "metrics": dict(self.net.metrics) if finished else {},
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Stand where a saved state stood; a round's optimizer is built by the round."""
        self.position = Position(**state["position"])
        self.history = History.from_dict(state["history"])
        self.generators = state["generators"]
        self.losses = {k: v.to(self.device) for k, v in state["losses"].items()}
        self.judged = {
            (alpha, (name, part)): Score(Fraction(value), None if maximum is None else Fraction(maximum))
            for alpha, name, part, value, maximum in state["judged"]
        }
        self.held_examples, self.held_scores = state["held_examples"], state["held_scores"]
        self.rewound, self.resumed = state["rewound"], state["optimization"]
        load_tensors(self.net.model, state["model"])
        made = self.position.round + (self.position.entered or self.position.phase != "train")
        for k in range(1, min(made, self.options.finishing_round)):
            for name, mask in unpack_masks(self.store.get(f"masks-{k:02d}"), self.net).items():
                self.net.set_mask(name, mask)
        for name, mask in unpack_masks(state["masks"], self.net).items():
            self.net.set_mask(name, mask)
            self.remade.add(name)
        self.gradients.update({k: v.to(self.device) for k, v in state["gradients"].items()})
        self.net.statistics.update(
            {n: {k: v.to(self.device) for k, v in s.items()} for n, s in state["statistics"].items()}
        )
        self.net.metrics.update(state["metrics"])

    def networks(self, round_: int) -> dict[str, tuple[str, ...]]:
        """Names of a round's subnets by pattern, in the net's order; none in round 0, all in finishing."""
        if round_ == 0:
            return {}
        if round_ > self.options.rounds:
            return {p.name: tuple(s.name for s in p.subnets()) for p in self.net.patterns}
        return {p.name: tuple(s.name for s in self.plan[round_ - 1][p.name]) for p in self.net.patterns}

    def names(self, last_round: int) -> list[str]:
        """Names of all distinct subnets of the rounds up to one, in the network's order."""
        trained = {s.name for row in self.plan[:last_round] for subnets in row.values() for s in subnets}
        return [name for name in self.net.names if name in trained]

    @contextmanager
    def weights_of(self, name: str) -> Iterator[None]:
        """The weights that a network has for its own, loaded for a while; nothing where it shares the net's."""
        if name not in self.history.weights:
            yield
            return
        model = self.net.model
        kept = {n: t.clone() for n, t in model_tensors(model).items()}
        load_tensors(model, self.store.get(self.history.weights[name]))
        try:
            yield
        finally:
            load_tensors(model, kept)

    def set_generators(self) -> None:
        """Put the training loader's own generators where they were at the start of the epoch."""
        set_generator_states(self.train_loader, self.generators)

    def keep_generators(self) -> None:
        """Note where the training loader's own generators are, an epoch being over."""
        self.generators = generator_states(self.train_loader)

    def optimization_state(self) -> dict[str, Any] | None:
        """A copy of the state of the round's optimizer and schedule."""
        state: dict[str, Any] | None = None if self.optimization is None else _cpu(self.optimization.state_dict())
        return state

    def seed(self, *what: int | str) -> None:
        """Seed all generators for what is about to be done."""
        seed_everything(self.options.seed, *what)

    def guarded(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Batches; a loader that breaks because the same Ctrl-C ended its workers counts as the interruption it is."""
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                return
            except Exception:
                if not self.interrupts.requested:
                    raise
                self.save(interrupted=True)
                raise KeyboardInterrupt from None
            yield batch

    def forward(self, model: nn.Module, batch: Any) -> Any:
        """The model's output alone."""
        return self.options.forward_fn(model, batch)[0]

    def score(self, name: str) -> Score:
        """Recalibrate a network's statistics and measure it on the held-out batches; higher is better."""
        self.net.recalibrate(name, self.recalibration, self.forward)
        return self.measure(name)

    def measure(self, name: str, batches: Iterable[Any] | None = None) -> Score:
        """Measure a network with the statistics that it has on the held-out batches, or some; higher is better."""
        assert self.held_out is not None
        with self.net.using(name):
            score = mean_score(self.net.model, batches or self.held_out, self.options.forward_fn, self.metric)
        if self.options.metric_mode == "min":
            return Score(-score.value, None if score.maximum is None else Fraction(0), score.count)
        return score

    def readable(self, value: Fraction) -> float:
        """A score as the user's metric had it."""
        return float(-value if self.options.metric_mode == "min" else value)


def pack_masks(masks: Mapping[str, Mask]) -> dict[str, Tensor]:
    """Masks as one mapping of tensors."""
    out = {}
    for name, mask in masks.items():
        out.update({f"{name}/elements/{key}": value for key, value in mask.elements.items()})
        if mask.removed is not None:
            out[f"{name}/removed"] = mask.removed
    return out


def unpack_masks(tensors: Mapping[str, Tensor], net: CocktailNet) -> dict[str, Mask]:
    """The inverse of :func:`pack_masks`; weights are in the network's order, whatever the file's."""
    place = {weight.name: i for i, weight in enumerate(net.eligible)}
    elements: dict[str, dict[str, Tensor]] = {}
    removed: dict[str, Tensor] = {}
    for key in sorted(tensors, key=lambda k: place.get(k.split("/", 2)[-1], len(place))):
        name, kind, *rest = key.split("/", 2)
        if kind == "removed":
            removed[name] = tensors[key]
        else:
            elements.setdefault(name, {})[rest[0]] = tensors[key]
    return {name: Mask(elements.get(name, {}), removed.get(name)) for name in sorted({*elements, *removed})}


def _cpu(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {k: _cpu(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_cpu(v) for v in value]
    return value
