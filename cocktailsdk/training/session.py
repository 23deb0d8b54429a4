"""A run in progress: what its phases share."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CocktailError, TrainingError
from ..masks import Mask
from ..net.subnet_model import SubnetModel
from ..patterns.base import DENSE
from ..utils.fsdp import is_sharded, local, rows_of
from ..utils.modes import TrainingModes
from ..utils.nested import to_device
from ..utils.weight_caches import forget_derived
from .averaging import Average
from .data.batches import HeldBatches
from .data.stream import Stream
from .distributed.ranks import SINGLE, Ranks, digest
from .distributed.recalibration import recalibrate
from .distributed.shared_store import SharedStore
from .distributed.sharing import inputs_of
from .events import Callback, Event, Saved, StepSkipped
from .interrupt import Interrupts, Stopped
from .metrics import MetricFn, NothingScored, Score, mean_score, readable
from .optimization import Optimization
from .options import Options
from .randomness import seed_everything
from .recipes import Step
from .round_plan import Plan, names_until, networks_of, step_of
from .state.encoding import pack_masks, plain, to_cpu, unpack_masks
from .state.history import History, Position
from .state.store import Store
from .step.distill import Classes
from .step.execution import Execution
from .step.nan_guard import SECONDS, LossWatch, Place, Skips, not_finite

__all__ = ["CallbackFailed", "LoaderFailed", "Session", "load_tensors", "model_tensors"]

log = logging.getLogger(__name__)


class LoaderFailed(Exception):
    """A loader or other code of the user's raised, at a moment from which the run can be resumed; it is the cause."""


class CallbackFailed(Exception):
    """A callback raised, at a moment from which the run can be resumed; its error is the cause."""


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer by name, detached, each once."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor.detach() for name, tensor in named}


@torch.no_grad()
def load_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy what :func:`model_tensors` gave back into place."""
    for name, tensor in model_tensors(model).items():
        here, value = local(tensor), local(tensors[name])
        if here.shape != value.shape:  # whole, and only some rows of it are here
            value = value[rows_of(tensor)]
        here.copy_(value)
    forget_derived()


@dataclass
class Session:
    """What the phases of a run share.

    Attributes:
        net: The networks.
        options: What is asked for.
        plan: The subnets of every round, by pattern.
        train_loader: As given.
        shared_loader: What this process loads of it: all, where it is alone.
        recalibration: Training batches for the batch-norm statistics.
        held_out: Batches of ``val_loader``; ``None`` without one.
        metric: The user's, or the one found.
        classes: Where the model's output holds logits.
        store: Where results go.
        interrupts: Whether the user asked to stop.
        device: Of the model.
        first_generators: States of the training loader's own generators when the run began.
        stream: The training batches, pass after pass over the loader.
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
        ranks: The processes that share the run.
        execution: How training passes run; ``None``: in this process alone.
        watch: Finds losses that are not finite.
        average: Of the round's weights, where one is wanted.
        modes: In which modules train; what the user froze stays in evaluation mode.
        skips: Leaves out steps whose losses are not, where the run is to go on without them.
    """

    net: SubnetModel
    options: Options
    plan: Plan
    train_loader: Iterable[Any]
    shared_loader: Iterable[Any]
    recalibration: HeldBatches
    held_out: HeldBatches | None
    metric: MetricFn
    classes: Classes | None
    store: Store | SharedStore
    interrupts: Interrupts
    device: torch.device
    first_generators: Mapping[str, Any]
    stream: Stream
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
    ranks: Ranks = SINGLE
    execution: Execution | None = None
    watch: LossWatch = field(init=False)
    skips: Skips | None = field(init=False)
    average: Average | None = field(init=False)
    modes: TrainingModes = field(init=False)
    _since: float = field(default_factory=time.monotonic)
    _saved: float = field(default_factory=time.monotonic)
    _told: float = 0.0
    _talked: float = field(default_factory=time.monotonic)
    _calls: int = 0
    _next_talk: int = 1
    _late: bool = False

    def __post_init__(self) -> None:
        # several processes look at the same step
        self.watch = LossWatch(self.device, seconds=SECONDS if self.ranks.world == 1 else float("inf"))
        self.skips = Skips(self.net.model.parameters()) if self.options.on_nan == "skip" else None
        self.modes = TrainingModes(self.net.model)
        self.average = None if self.options.ema is None else Average(self.net.model, self.options.ema)

    def emit(self, event: Event) -> None:
        """Tell the callbacks. Only where the run can be resumed: an interrupt here saves, then stops the run.

        Of several processes the main one tells; all stop where one was interrupted.

        Raises:
            CallbackFailed: A callback raised, or left a subnetwork active.
            Stopped: The run was asked to stop.
        """
        stop = False
        try:
            for callback in self.options.callbacks if self.ranks.is_main else ():
                self._tell(callback, event)
        except KeyboardInterrupt:
            if self.interrupts.again:
                raise
            stop = True
        if self.ranks.any(stop or self.interrupts.requested):
            raise Stopped

    def _tell(self, callback: Callback, event: Event) -> None:
        active = DENSE
        try:
            callback(event)
        except Exception as error:
            raise CallbackFailed from error
        finally:
            if self.net.active != DENSE:  # whose weights are the run's
                active = self.net.active
                self.net.switch(DENSE)
        if active != DENSE:
            raise CallbackFailed from TrainingError(
                f"a callback left {active!r} active after {type(event).__name__}, and training would go on in it: use "
                f"it within `with net.using({active!r}):`"
            )

    def stop_if_asked(self) -> None:
        """End the run here if it was asked to stop, where it can be resumed; several processes do so at events."""
        if self.ranks.world == 1 and self.interrupts.requested:
            raise Stopped

    def due(self) -> bool:
        """Whether it is time for a throttled event, or an interrupt waits for one.

        Several processes must agree, and do so about as often as such events are due.
        """
        if self.ranks.world == 1:
            return self._time_has_come() or self.interrupts.requested
        self._calls += 1
        if self._calls < self._next_talk:
            return False
        come, self._late, self._next_talk = self.ranks.from_main(self._talk)
        self._calls = 0
        if self.ranks.any(self.interrupts.requested):
            self.interrupts.requested = True
        return come or self.interrupts.requested

    def _time_has_come(self) -> bool:
        now = time.monotonic()
        if now - self._told < self.options.event_seconds and not self.interrupts.requested:
            return False
        self._told = now
        return True

    def _talk(self) -> tuple[bool, bool, int]:
        """Whether an event is due, whether a save is, and after how many calls to ask again."""
        now = time.monotonic()
        each = max(now - self._talked, 1e-6) / max(self._calls, 1)
        self._talked = now
        return self._time_has_come(), self._is_late(), min(max(int(self.options.event_seconds / each), 1), 1000)

    def save_if_due(self) -> None:
        """Save at the end of an epoch or the like, where the last save is old enough."""
        least = min(self.options.save_seconds, 60 * self.options.save_minutes)
        if self.ranks.from_main(lambda: time.monotonic() - self._saved >= least):
            self.save()

    def save_if_late(self) -> None:
        """Save in the middle of something, where the last save is too old; several processes when they talk anyway."""
        if self.ranks.world > 1:
            late, self._late = self._late, False
        else:
            late = self._is_late()
        if late:
            self.save()

    def _is_late(self) -> bool:
        return time.monotonic() - self._saved >= 60 * self.options.save_minutes

    def save(self, *, interrupted: bool = False, tell: bool = True) -> Path | None:
        """Write the run's state; where it went.

        Args:
            interrupted: Whether the run ends here.
            tell: Whether to tell the callbacks.

        Raises:
            TrainingError: Where losses or weights are not finite any more, and where the disk fails. The states before
                are left as they are.
        """
        self.check()
        now = time.monotonic()
        self.history.seconds += now - self._since
        self._since = now
        path = self.store.save(self.state, self.needs)
        self._saved = time.monotonic()
        if path is None:
            return None
        event = Saved(path, interrupted)
        if not interrupted:
            self.emit(event)
            return path
        log.info("interrupted; the same call goes on from %s", path)
        for callback in self.options.callbacks if self.ranks.is_main and tell else ():
            callback(event)
        return path

    def check(self) -> None:
        """See that all is finite that is trained.

        Raises:
            TrainingError: It is not.
        """
        if self.skips is None and (wrong := self.watch.look()) is not None:
            raise self.poisoned(wrong)
        if self.position.phase not in ("train", "finishing") or not self.position.entered:
            return
        wrong_ones = not_finite(self.net.model)
        if self.ranks.any(bool(wrong_ones)):
            more = f" and {len(wrong_ones) - 3} more" if len(wrong_ones) > 3 else ""
            raise self.poisoned(
                f"{', '.join(wrong_ones[:3])}{more} became infinite or no number by round {self.position.round}, epoch "
                f"{self.position.epoch}, step {self.position.step} (all from 0; step {self.history.steps} of the run), "
                "though the losses were finite"
            )

    def poisoned(self, wrong: str) -> TrainingError:
        """What is raised where numbers are not finite any more."""
        other = ', or leave such steps out (on_nan="skip")' if self.skips is None else ""
        return TrainingError(
            f"{wrong}. Nothing was saved since. {self.store.standing} Lower the learning rate, or look for values in "
            f"the data that are not finite{other}"
        )

    def skipped(self, place: Place, losses: Mapping[str, Tensor]) -> None:
        """Note a step that was left out."""
        assert self.skips is not None
        self.history.skipped += 1
        try:
            name, value = self.skips.note(place, losses)
        except TrainingError as error:
            raise TrainingError(f"{error}. {self.store.standing}") from None
        log.warning("left out a step %s: the loss of %s was %g, or its gradients were not finite", place, name, value)

    def tell_skipped(self) -> None:
        """Emit what :meth:`skipped` noted, where the run can be resumed."""
        if self.skips is not None and self.skips.waiting:
            waiting, self.skips.waiting = self.skips.waiting, []
            for place, name, value in waiting:
                self.emit(StepSkipped(place.round, place.epoch, place.step, place.batch, name, value))

    def needs(self, file: str) -> bool:
        """Whether a file that was put into the store will be read again."""
        return (
            self.position.phase in ("train", "merge")
            or not file.startswith(("round-", "rewind"))
            or file in self.history.weights.values()
        )

    def state(self) -> dict[str, Any]:
        """The run as it stands, as tensors and plain values."""
        measured = self.position.phase in ("finish", "done")
        tracked = self.options.recipe.statistics == "separate"
        return {
            "position": asdict(self.position),
            "history": self.history.to_dict(),
            "classes": None if self.classes is None else asdict(self.classes),
            "first_generators": self.first_generators,
            "generators": self.stream.generators,
            "stream": self.stream.state_dict(),
            "losses": self.losses,
            "judged": [
                [alpha, *cell, str(score.value), None if score.maximum is None else str(score.maximum)]
                for (alpha, cell), score in self.judged.items()
            ],
            "held_examples": self.held_examples,
            "held_scores": self.held_scores,
            "masks": pack_masks({name: self.net.masks[name] for name in sorted(self.remade)}),
            "gradients": dict(self.gradients),
            "rewound": self.rewound,
            "model": model_tensors(self.net.model),
            "average": None if self.average is None else self.average.state_dict(),
            "optimization": None if self.optimization is None else plain(self.optimization.state_dict()),
            "statistics": {k: dict(v) for k, v in self.net.statistics.items()} if measured or tracked else {},
            "metrics": dict(self.net.metrics) if measured else {},
            "skipped_in_a_row": 0 if self.skips is None else self.skips.in_a_row,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Stand where a saved state stood; a round's optimizer is built by the round."""
        self.position = Position(**state["position"])
        self.history = History.from_dict(state["history"])
        self.stream.generators = state["generators"]
        self.stream.load_state_dict(state.get("stream") or self._old_stream())
        self.losses = {k: v.to(self.device) for k, v in state["losses"].items()}
        self.judged = {
            (alpha, (name, part)): Score(Fraction(value), None if maximum is None else Fraction(maximum))
            for alpha, name, part, value, maximum in state["judged"]
        }
        self.held_examples, self.held_scores = state["held_examples"], state["held_scores"]
        self.rewound, self.resumed = state["rewound"], state["optimization"]
        load_tensors(self.net.model, state["model"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
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
        if self.skips is not None:
            self.skips.in_a_row = state.get("skipped_in_a_row", 0)

    def _old_stream(self) -> dict[str, Any]:
        """Where the stream is in a state of release 0.1.0, in which every epoch began a pass of its own."""
        at, options = self.position, self.options
        passes = (at.round - options.first_round) * options.epochs + at.epoch
        if not (at.entered and at.step):
            return {"begun": None, "drawn": 0, "passes": passes}
        first = (at.epoch - options.epochs_of(at.round).start) * options.steps_per_epoch
        drawn, led = 0, False
        for i in range(at.step):
            step = self.step_at(at.round, first + i)
            drawn += not (led and step.follows)
            led = options.recipe.same_batch and step.leads
        return {"begun": (at.round, at.epoch, 0), "drawn": drawn, "passes": passes + 1}

    def step_at(self, round_: int, step: int) -> Step:
        """What a round's step does, by the recipe."""
        options, networks = self.options, self.networks(round_)
        return step_of(options.recipe, networks, round_, step, options.steps_of(round_), options.seed, options.rounds)

    def networks(self, round_: int) -> dict[str, tuple[str, ...]]:
        """Names of a round's subnets by pattern, in the net's order; none in round 0, all in finishing."""
        return networks_of(self.net, self.plan, round_)

    def names(self, last_round: int) -> list[str]:
        """Names of all distinct subnets of the rounds up to one, in the network's order."""
        return names_until(self.net, self.plan, last_round)

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

    def optimization_state(self) -> dict[str, Any] | None:
        """A copy of the state of the round's optimizer and schedule."""
        state: dict[str, Any] | None = None if self.optimization is None else to_cpu(self.optimization.state_dict())
        return state

    def seed(self, *what: int | str) -> None:
        """Seed all generators for what is about to be done."""
        seed_everything(self.options.seed, *what)

    def next_batches(self) -> tuple[list[Any], int]:
        """The next step's training batches, on the device, and the index of the first in its pass over the loader.

        Raises:
            Stopped, LoaderFailed: As of :meth:`guarded`.
            TrainingError: The loader gives no batches.
        """
        at = self.position

        def of() -> str:
            return f"train_loader, in round {at.round}, epoch {at.epoch},"

        place = at.round, at.epoch, at.step
        batches, first = self.stream.draw(place, lambda drawn: self.guarded(drawn, of))
        return to_device(batches, self.device), first

    def guarded(self, batches: Iterable[Any], of: str | Callable[[], str]) -> Iterator[Any]:
        """Batches, none any more once the run was asked to stop.

        Only to be used where the run can be resumed from between two batches.

        Args:
            batches: From a loader.
            of: What they are, for errors; or a function that says so.

        Raises:
            Stopped: The run was asked to stop; also where a loader breaks because the same Ctrl-C ended its workers.
            LoaderFailed: The loader raised.
        """
        iterator = iter(batches)
        i = 0
        try:
            while True:
                self.stop_if_asked()
                try:
                    batch = next(iterator)
                except StopIteration:
                    return
                except Exception as error:
                    self.stop_if_asked()
                    what = of if isinstance(of, str) else of()
                    said = " ".join(str(error).split())
                    raise LoaderFailed(
                        f"{what} raised {type(error).__name__} ({said}) for batch {i}, from 0"
                    ) from error
                yield batch
                i += 1
        finally:
            if isinstance(iterator, Generator):  # puts the loader's generators back
                iterator.close()

    @property
    def scaled(self) -> bool:
        """Whether losses are scaled, so that steps may be left out for overflow."""
        return self.options.precision.name == "fp16"

    @contextmanager
    def working(self, on: str) -> Iterator[None]:
        """Work on trained weights, whose failure must not lose them.

        Only to be used where the run can be resumed.

        Args:
            on: What is done, for errors.

        Raises:
            LoaderFailed: Something raised.
        """
        try:
            yield
        except (Stopped, LoaderFailed, NothingScored):
            raise
        except Exception as error:
            what = error if isinstance(error, CocktailError) else f"{type(error).__name__}: {error}"
            raise LoaderFailed(f"{on} failed ({' '.join(str(what).split())})") from error

    @property
    def own(self) -> tuple[int | str, ...]:
        """What this process adds to the seed of what it does with its own examples; nothing in the main one."""
        return ("rank", self.ranks.rank) if self.ranks.rank else ()

    def agreed(self, masks: Mapping[str, Mask]) -> dict[str, Mask]:
        """The main process's masks, in all."""
        if self.ranks.world == 1:
            return dict(masks)
        packed = pack_masks(masks)
        names = self.ranks.from_main(lambda: list(packed))
        return unpack_masks({name: self.ranks.tensor(packed.get(name)) for name in names}, self.net)

    def verify(self, what: str) -> None:
        """Make sure that weights and the round's masks are the same in all processes."""

        def value() -> str:
            names = [name for names in self.networks(self.position.round).values() for name in names]
            masks = {name: self.net.masks[name] for name in names if name in self.net.masks}
            weights = {n: t for n, t in model_tensors(self.net.model).items() if not is_sharded(t)}
            return digest({**weights, **pack_masks(masks)})

        self.ranks.verify(what, value)

    def align_buffers(self) -> None:
        """Take over the main process's buffers and statistics: the others' saw other examples."""
        if self.ranks.world > 1:
            self.ranks.align(buffer.detach() for buffer in self.net.model.buffers())
            for statistics in self.net.statistics.values():
                self.ranks.align(statistics.values())

    def forward(self, model: nn.Module, batch: Any) -> Any:
        """The model's output alone."""
        return self.options.forward_fn(model, inputs_of(batch))[0]

    def recalibrate(self, name: str) -> None:
        """Measure a network's batch-norm statistics; several processes each on their parts of the batches."""
        batches = self.guarded(self.recalibration, "train_loader, recalibrating,")
        together = self.execution is not None and self.execution.sharded
        with self.working(f"recalibrating {name!r}"):
            recalibrate(self.net, name, batches, self.forward, self.ranks, together=together)

    def score(self, name: str) -> Score:
        """Recalibrate a network's statistics and measure it on the held-out batches; higher is better."""
        self.recalibrate(name)
        return self.measure(name)

    def measure(self, name: str, batches: Iterable[Any] | None = None) -> Score:
        """Measure a network with the statistics that it has on the held-out batches, or some; higher is better."""
        assert self.held_out is not None
        with self.working(f"measuring {name!r} on held-out data"), self.net.using(name, changes="discard"):
            guarded = self.guarded(batches or self.held_out, "val_loader")
            score = mean_score(self.net.model, guarded, self.options.forward_fn, self.metric, self.ranks)
        if score.number != score.number:
            log.warning(
                "the metric of %s is not finite (mean of %d scores): it is recorded as NaN, and not chosen for",
                name,
                score.count,
            )
        return score.negated() if self.options.metric_mode == "min" else score

    def readable(self, value: Fraction) -> float:
        """A score as the user's metric had it; NaN where it was not finite."""
        return -readable(value) if self.options.metric_mode == "min" else readable(value)
