"""Opening a run: a new one, or one that is resumed from its store."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..net.subnet_model import SubnetModel
from ..utils.fsdp import is_sharded
from .checkpoints import restore
from .data.batches import CachedBatches, Stream
from .data.loader_state import generator_states, make_generators, set_generator_states
from .distributed.launch import Launch
from .distributed.shared_store import SharedStore
from .events import TrainingStarted
from .infer_task import choose_metric, infer_task, try_metric
from .interrupt import Interrupts
from .options import Loaders, Options
from .round_plan import Plan
from .session import REWIND, RunData, Session, model_tensors
from .state.compatibility import check_state
from .state.history import Position
from .state.store import Store
from .step.distill import Classes
from .step.execution import Execution
from .step.nan_guard import has_nonfinite
from .step.teacher import FrozenTeacher

__all__ = ["open_session", "training_started"]


def open_session(
    net: SubnetModel,
    options: Options,
    plan: Plan,
    loaders: Loaders,
    launch: Launch,
    device: torch.device,
    store: Store | SharedStore,
    interrupts: Interrupts,
) -> Session:
    """A session that stands where the stored run stopped, or at the beginning.

    Args:
        net: The networks, on the device.
        options: What the run does.
        plan: The subnets of every round.
        loaders: The run's.
        launch: The processes.
        device: Of the model.
        store: Where a run may have been saved.
        interrupts: Whether the user asks to stop.

    Raises:
        TrainingError: The net, the loaders and the functions do not fit each other, or what is stored is damaged.
    """
    ranks, train = launch.ranks, loaders.train
    now = generator_states(train)
    state = store.load(lambda state, files, shapes: check_state(state, net, options, now, files, shapes))
    # The loader's own generators are set before anything is drawn: all that follows repeats, in all processes alike.
    first = ranks.from_main(lambda: generator_states(train))
    if state is not None:
        first = state["first_generators"]
        make_generators(train, first)
    if state is not None or ranks.world > 1:
        set_generator_states(train, first)
    if ranks.world > 1:  # before anything is computed with the weights
        ranks.align(tensor for tensor in model_tensors(net.model).values() if not is_sharded(tensor))
    if state is None:
        found = infer_task(net.model, _recalibration(loaders, options, device), options)
        classes = ranks.from_main(lambda: found)
        # a loader may have made generators in its first pass: they belong to the run's first states too
        first = ranks.from_main(lambda: {**generator_states(train), **first})
    else:
        classes = None if state["classes"] is None else Classes(**state["classes"])
    stream = Stream(
        train,
        loaders.shared_train,
        options.seed,
        size=options.gradient_accumulation_steps,
        length=options.pass_length,
        generators=first,
    )
    held_out = None
    if loaders.held_out is not None:
        key = options.seed, "held out"
        held_out = CachedBatches(loaders.held_out, key, device, again=loaders.shared_held_out)
    session = Session(
        net=net,
        options=options,
        plan=plan,
        data=RunData(
            stream,
            _recalibration(loaders, options, device),
            held_out,
            first,
            # whole batches, also of several processes: all judge the same, whatever their number
            CachedBatches(train, (options.seed, "calibration"), torch.device("cpu"), without=_left_out(options)),
        ),
        metric=choose_metric(classes, options),
        classes=classes,
        store=store,
        interrupts=interrupts,
        device=device,
        ranks=ranks,
        execution=_execution(net, options, launch, device),
        position=Position("train", options.first_round),
    )
    if state is not None:
        restore(session, state)
    elif held_out is not None:
        try_metric(net.model, held_out, options, session.metric, ranks)
    if session.execution is not None:
        session.execution.frozen = _frozen_teacher(session)
    if ranks.world > 1 and session.execution is not None and session.position.phase != "done":
        # DDP compares the processes' weights when it wraps the model: they must be restored by now
        session.execution.wrap(next(iter(session.data.recalibration)), options.loss_fn)
    return session


def _frozen_teacher(session: Session) -> FrozenTeacher | None:
    """The weights that the run started from, where they teach: they are stored when its round begins."""
    at, model = session.position, session.net.model
    if not session.options.frozen_teacher or at.phase in ("finish", "done"):
        return None
    begun = at.entered or at.phase != "train"
    return FrozenTeacher(model, session.store.get(REWIND) if begun else model_tensors(model))


def _recalibration(loaders: Loaders, options: Options, device: torch.device) -> CachedBatches:
    key = options.seed, "recalibration"
    without = _left_out(options)
    return CachedBatches(loaders.shared_train, key, device, options.recalibration_batches, without=without)


def _left_out(options: Options) -> Callable[[Any], bool] | None:
    """Which batches nothing is measured on: a single one with NaN would make all statistics and scores NaN."""
    return has_nonfinite if options.settings.execution.on_nan == "skip" else None


def _execution(net: SubnetModel, options: Options, launch: Launch, device: torch.device) -> Execution:
    execution = options.settings.execution
    return Execution(
        net.model,
        options.forward_fn,
        ranks=launch.ranks,
        precision=options.precision,
        device=device,
        accelerator=launch.accelerator,
        clip_norm=execution.max_grad_norm,
        sync_batch_norm=execution.sync_batch_norm,
    )


def training_started(session: Session) -> TrainingStarted:
    """The event with which a run begins, or is resumed: how long it is, and how much of it is done."""
    options, at = session.options, session.position
    done = options.steps_before(options.finishing_round)
    if at.phase in ("train", "finishing"):
        done = options.steps_before(at.round)
        if at.entered:
            done += (at.epoch - options.epochs_of(at.round).start) * options.steps_per_epoch + at.step
    elif at.phase in ("refit", "finish"):
        done = options.all_steps
    return TrainingStarted(
        rounds=options.rounds,
        first_round=options.first_round,
        epochs=options.epochs,
        steps_per_epoch=options.steps_per_epoch,
        total_steps=options.all_steps,
        done_steps=done,
        resumed=bool(session.history.rounds),
    )
