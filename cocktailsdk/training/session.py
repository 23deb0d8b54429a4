"""A run in progress: the data that its phases share. What is done with it is in the modules beside.

Calls into the user's code are in :mod:`.user_code`, measuring in :mod:`.evaluation`, saving and restoring in
:mod:`.checkpoints`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration import CalibrationData
from ..masks import Mask
from ..masks.packed import PackedMasks
from ..net.subnet_model import SubnetModel
from ..net.switcher import forget_derived
from ..utils.fsdp import is_sharded, local, rows_of
from ..utils.modes import TrainingModes
from .averaging import Average
from .data.batches import CachedBatches, Stream
from .distributed.ranks import Ranks, digest
from .distributed.shared_store import SharedStore
from .head_fit import Head
from .interrupt import Interrupts
from .metrics import MetricFn, Score
from .optimization import Optimization
from .options import Options
from .pass_shares import PassShares
from .randomness import seed_everything
from .recipes import ScheduleContext, Step
from .round_plan import Plan, names_until, networks_of, step_of
from .state.encoding import decode_masks, encode_masks
from .state.history import History, Position
from .state.store import Store
from .step.distill import Classes
from .step.execution import Execution
from .step.hooks import StepHooks
from .step.nan_guard import SECONDS, LossWatch, Skips
from .timing import Timing

__all__ = ["REWIND", "MergeState", "RunData", "Session", "load_tensors", "model_tensors"]


REWIND = "rewind"
"""The file of the weights that rounds begin with; from trained weights, those that the run started from."""


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer by name, detached, each once."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor.detach() for name, tensor in named}


@torch.no_grad()
def load_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy what :func:`model_tensors` returned back into the model."""
    for name, tensor in model_tensors(model).items():
        shard, value = local(tensor), local(tensors[name])
        if shard.shape != value.shape:  # the value has all rows, and this process only some of them
            value = value[rows_of(tensor)]
        shard.copy_(value)
    forget_derived()


@dataclass
class RunData:
    """The batches of a run.

    Attributes:
        stream: Training batches, pass after pass over the loader.
        recalibration: Training batches for the batch-norm statistics.
        held_out: Batches of ``val_loader``; ``None`` without one.
        first_generators: States of the training loader's own generators when the run began.
        calibration: Training batches that scores are judged from where the user gave no calibration data.
        calibration_data: What of them was read, once scores were judged.
    """

    stream: Stream
    recalibration: CachedBatches
    held_out: CachedBatches | None
    first_generators: Mapping[str, Any]
    calibration: CachedBatches
    calibration_data: CalibrationData | None = None


@dataclass
class MergeState:
    """What merging has found so far.

    Attributes:
        scores: Those that merging still needs, by interpolation coefficient, network and part of the held-out set.
        batches: Held-out batches as merging goes through them; ``None`` where it takes them as they are.
        order: The order of examples in ``batches``.
        score_count: Scores of a pass over ``batches``.
    """

    scores: dict[tuple[float, tuple[str, int]], Score] = field(default_factory=dict)
    batches: list[Any] | None = None
    order: Tensor | None = None
    score_count: int = 0


@dataclass
class Session:
    """What the phases of a run share.

    Attributes:
        net: The networks.
        options: What the run does.
        plan: The subnets of every round, by pattern.
        data: The run's batches.
        metric: The user's, or the one found.
        classes: Where the model's output holds logits.
        store: Where results go.
        interrupts: Whether the user asked to stop.
        device: Of the model.
        ranks: The processes that share the run.
        execution: How training passes run; ``None`` once the run is over.
        position: Where the run stands.
        history: What came out of it.
        optimization: Optimizer and schedule of the current round.
        losses: By network the sum of this epoch's losses and their number.
        merging: What merging has found so far.
        remade: Subnets whose masks were made anew while the round trained.
        hooks: This run's copies of the recipe's.
        rewound: State of optimizer and schedule at the rewind point, where they are rewound as well.
        resumed: The same of the round that is resumed.
        watch: Finds losses that are not finite.
        skips: Leaves out steps whose losses are not finite, with ``on_nan="skip"``.
        average: Of the round's weights, with ``ema_decay``.
        shares: Of the round's passes, if the recipe allocates them.
        heads: By network, the classifier head that was fitted so far; ``None`` if the trained one is better.
        modes: In which modules train; what the user froze stays in evaluation mode.
        timing: When to report and to save.
    """

    net: SubnetModel
    options: Options
    plan: Plan
    data: RunData
    metric: MetricFn
    classes: Classes | None
    store: Store | SharedStore
    interrupts: Interrupts
    device: torch.device
    ranks: Ranks
    execution: Execution | None
    position: Position
    history: History = field(default_factory=History)
    optimization: Optimization | None = None
    losses: dict[str, Tensor] = field(default_factory=dict)
    merging: MergeState = field(default_factory=MergeState)
    remade: set[str] = field(default_factory=set)
    heads: dict[str, Head | None] = field(default_factory=dict)
    rewound: dict[str, Any] | None = None
    resumed: dict[str, Any] | None = None
    hooks: StepHooks = field(init=False)
    watch: LossWatch = field(init=False)
    skips: Skips | None = field(init=False)
    average: Average | None = field(init=False)
    shares: PassShares | None = field(init=False)
    modes: TrainingModes = field(init=False)
    timing: Timing = field(init=False)

    def __post_init__(self) -> None:
        execution, model = self.options.settings.execution, self.net.model
        self.hooks = self.options.recipe.step_hooks()
        # several processes must look at the losses of the same step: by their number, not by each one's clock
        self.watch = LossWatch(self.device, seconds=SECONDS if self.ranks.world == 1 else float("inf"))
        self.skips = Skips(model.parameters()) if execution.on_nan == "skip" else None
        self.modes = TrainingModes(model)
        self.average = None if execution.ema_decay is None else Average(model, execution.ema_decay)
        allocation, rounds = self.options.recipe.allocation, self.options.rounds
        self.shares = None
        if allocation is not None:
            self.shares = PassShares(allocation, self.networks(rounds), self.options.steps_of(rounds))
        self.timing = Timing(self.options.settings.output, self.ranks, self.interrupts)

    def context_at(self, round_: int, step: int) -> ScheduleContext:
        """What the recipe's schedule knows in a round's step."""
        options = self.options
        due = {} if self.shares is None else self.shares.due()
        return ScheduleContext(round_, step, options.steps_of(round_), self.networks(round_), options.seed, due)

    def step_at(self, round_: int, step: int) -> Step:
        """What a round's step does, by the recipe."""
        return step_of(self.options.recipe, self.context_at(round_, step), self.options.rounds)

    def networks(self, round_: int) -> dict[str, tuple[str, ...]]:
        """Names of a round's subnets by pattern, in the net's order; none in round 0, all in finishing."""
        return networks_of(self.net, self.plan, round_)

    def names(self, last_round: int) -> list[str]:
        """Names of all distinct subnets of the rounds up to one, in the net's order."""
        return names_until(self.net, self.plan, last_round)

    @contextmanager
    def weights_of(self, name: str) -> Iterator[None]:
        """Load the weights that a network has for its own meanwhile; nothing where it shares the net's."""
        if name not in self.history.weights:
            yield
            return
        model = self.net.model
        shared = {n: t.clone() for n, t in model_tensors(model).items()}
        load_tensors(model, self.store.get(self.history.weights[name]))
        try:
            yield
        finally:
            load_tensors(model, shared)

    @property
    def scaled(self) -> bool:
        """Whether losses are scaled, so that steps may be left out for overflow."""
        return self.options.precision.name == "fp16"

    def seed(self, *key: int | str) -> None:
        """Seed all generators for what is about to be done."""
        seed_everything(self.options.seed, *key)

    @property
    def rank_key(self) -> tuple[int | str, ...]:
        """What this process adds to the seed where it works on its own examples; nothing in the main one."""
        return ("rank", self.ranks.rank) if self.ranks.rank else ()

    def broadcast_masks(self, masks: Mapping[str, Mask]) -> dict[str, Mask]:
        """The main process's masks, in all processes."""
        if self.ranks.world == 1:
            return dict(masks)
        encoded = encode_masks(self.net, masks) if self.ranks.is_main else {}
        keys = self.ranks.from_main(lambda: list(encoded))
        return decode_masks({key: self.ranks.tensor(encoded.get(key)) for key in keys}, self.net)

    def broadcast_buffers(self) -> None:
        """Take over the main process's buffers and statistics: those of others saw other examples."""
        if self.ranks.world > 1:
            self.ranks.align(buffer.detach() for buffer in self.net.model.buffers())
            for statistics in self.net.statistics.values():
                self.ranks.align(statistics.values())

    def verify(self, name: str) -> None:
        """Check that weights and the round's masks, called by that name in errors, are equal in all processes."""

        def value() -> str:
            names = [name for names in self.networks(self.position.round).values() for name in names]
            masks = {name: self.net.masks[name] for name in names if name in self.net.masks}
            weights = {n: t for n, t in model_tensors(self.net.model).items() if not is_sharded(t)}
            bits = {name: PackedMasks(mask.elements.items()).bits for name, mask in masks.items()}
            units = {f"{name}/removed": m.removed for name, m in masks.items() if m.removed is not None}
            experts = {f"{name}/experts/{s}": e for name, m in masks.items() for s, e in m.experts.items()}
            return digest({**weights, **bits, **units, **experts})

        self.ranks.verify(name, value)
