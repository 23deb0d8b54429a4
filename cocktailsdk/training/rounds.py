"""The rounds: prune, rewind, train as the recipe says (paper, section 3); then finishing, on the merged weights."""

from __future__ import annotations

import logging
import time
from functools import partial
from typing import Any, Literal

import torch

from ..errors import TrainingError
from ..masks import Mask
from ..patterns.base import DENSE
from .checkpoints import check_finite, emit_skipped, nonfinite_error, save, save_if_due, save_if_late
from .evaluation import displayed, measure, score, warn_if_untrained
from .events import EpochEnded, RoundEnded, RoundStarted, StepDone
from .left_out import note_step
from .need import measure_if_due
from .optimization import Optimization
from .recipes import ScheduleContext, Step
from .round_plan import round_masks, step_of
from .round_scores import scores_now
from .session import REWIND, Session, load_tensors, model_tensors
from .state.encoding import encode_masks, to_cpu
from .state.history import RoundHistory
from .step.engine import Stepper, StepResult
from .step.hooks import HookCalls, StepContext
from .step.nan_guard import StepLocation, StepSnapshot
from .step.same_batch import SameBatch
from .user_code import emit, next_batches

__all__ = ["train_rounds"]

log = logging.getLogger(__name__)


def train_rounds(session: Session, phase: Literal["train", "finishing"]) -> None:
    """Train the remaining rounds of a phase, from wherever the run stands."""
    assert session.execution is not None
    stepper = Stepper.of(session.net, session.execution, session.options, session.classes)
    stepper.allows = None if session.skips is None else session.skips.allows
    while session.position.phase == phase:
        if session.position.entered:
            _resume_round(session)
        else:
            _enter_round(session)
        try:
            _train_round(session, stepper)
        finally:
            session.data.stream.close()  # what comes next may iterate over the same loader
        _end_round(session)


def _enter_round(session: Session) -> None:
    """Make the round's masks from the weights that the one before ended with, then rewind."""
    position, options, store = session.position, session.options, session.store
    session.net._drop_private()
    k = position.round
    if 0 < k <= options.rounds:
        if k == 1 and options.start == "pretrained":
            if options.recipe.teacher == "frozen" and session.data.held_out is not None and not session.history.before:
                session.history.before = {DENSE: displayed(session, measure(session, DENSE).value)}
                warn_if_untrained(session)
            store.put(REWIND, model_tensors(session.net.model))
            if options.recipe.weights == "own" and options.recipe.rounds == "levels":
                session.history.weights[DENSE] = REWIND  # no round trains the dense network
        masks = _make_masks(session, k)
        # those that stayed as the files of their rounds have them, which are read before this one
        base = {name: session.net.masks[name] for name in session.names(k - 1) if name not in session.remade}
        store.put(f"masks-{k:02d}", encode_masks(session.net, masks, base))
        if options.rewinds:
            load_tensors(session.net.model, store.get(REWIND))
    session.optimization = Optimization.begin(session.net.model, options, k, session.device)
    if session.average is not None:
        session.average.begin()
    if 0 < k <= options.rounds and session.rewound is not None:
        session.optimization.load_state_dict(session.rewound)
    position.entered = True
    position.epoch, position.step = options.epochs_of(k).start, 0
    session.losses = {}
    if options.recipe.statistics == "separate":
        session.net.statistics.clear()
    context = session.context_at(k, 0)
    session.history.rounds.append(RoundHistory(k, [*context.names], made={}))
    for hook in session.hooks.of(context, options.rounds):
        hook.on_round_start(context)
    _keep_rewind_point(session)
    save(session)
    emit(session, RoundStarted(k, context.names, len(options.epochs_of(k))))


def _resume_round(session: Session) -> None:
    assert session.resumed is not None
    k = session.position.round
    session.optimization = Optimization.begin(session.net.model, session.options, k, session.device)
    session.optimization.load_state_dict(session.resumed)
    session.resumed = None
    names = session.history.rounds[-1].networks
    emit(session, RoundStarted(k, tuple(names), len(session.options.epochs_of(k))))


def _make_masks(session: Session, k: int) -> dict[str, Mask]:
    """Masks of the subnets that are new in a round, by the recipe's rule."""
    net, options = session.net, session.options

    def load_dense() -> None:
        load_tensors(net.model, session.store.get(REWIND if options.first_round else "round-00"))

    calibrate = None if options.scoring is None else partial(scores_now, session)
    masks = session.broadcast_masks(round_masks(options.recipe, net, session.plan, k, load_dense, calibrate))
    for name, mask in masks.items():
        net.set_mask(name, mask)
    return masks


def _keep_rewind_point(session: Session) -> None:
    position, options = session.position, session.options
    if position.round != 0 or position.epoch != options.rewind_epoch:
        return
    session.store.put(REWIND, model_tensors(session.net.model))
    if options.settings.rounds.rewind_schedule and options.rewinds:
        assert session.optimization is not None
        session.rewound = to_cpu(session.optimization.state_dict())


def _train_round(session: Session, stepper: Stepper) -> None:
    position, options, optimization = session.position, session.options, session.optimization
    assert optimization is not None
    k = position.round
    session.modes.apply()
    session.verify(f"the weights and masks of round {k}")
    started, ran = time.monotonic(), 0
    while position.epoch < options.epochs_of(k).stop:
        batches: list[Any] = []
        at, shared = 0, SameBatch(options.recipe.same_batch)
        steps = options.steps_in(k, position.epoch)
        for i in range(position.step, steps):
            number = (position.epoch - options.epochs_of(k).start) * options.steps_per_epoch + i
            measure_if_due(session, k, number)
            context = session.context_at(k, number)
            step = step_of(options.recipe, context, options.rounds)
            if not shared.follows(step):
                shared.clear()
                batches, at = next_batches(session)
            hooks = _hooks(session, step, context)
            hooks("before_step")
            # after the hooks, so that whatever they draw leaves the step's own random numbers as they are
            session.seed("step", k, position.epoch, i, *session.rank_key)
            location = StepLocation(k, position.epoch, i, at, session.history.steps)
            # after before_step, whose changes stay: the next step would not make them again
            snapshot = None if session.skips is None else StepSnapshot(session.net, step)
            hooks.context.undo = snapshot
            ends = i + 1 == steps
            result = stepper.step(
                step,
                batches,
                optimization.optimizer,
                shared.teacher,
                optimization.scaler,
                keep_teacher=shared.leads(step, last=ends),
                hooks=hooks,
            )
            shared.done(step, result.teacher, last=ends)
            if result.made:
                optimization.scheduler.step()
                if session.average is not None:
                    session.average.update()
            _count(session, step, result, location, snapshot)
            position.step = i + 1
            ran += 1
            if shared.open:  # the next step may need this batch, which no state holds: no save and no event here
                continue
            emit_skipped(session)
            if session.timing.event_due():
                done = options.steps_before(k) + number + 1
                rate = ran / max(time.monotonic() - started, 1e-9)
                names = "+".join(result.losses)
                emit(session, StepDone(k, position.epoch, i + 1, done, options.all_steps, rate, names))
            save_if_late(session)
        _end_epoch(session, ran / max(time.monotonic() - started, 1e-9))


def _hooks(session: Session, step: Step, context: ScheduleContext) -> HookCalls:
    """The hooks of a step, with what they may change."""
    assert session.optimization is not None
    step_context = StepContext(
        session.net,
        step,
        context,
        session.optimization.optimizer,
        agreed=session.broadcast_masks,
        changed=session.remade.add,
        snapshot=lambda name: _snapshot_weights(session, name),
        calibrate=partial(scores_now, session),
    )
    return HookCalls(session.hooks.of(context, session.options.rounds), step_context)


def _snapshot_weights(session: Session, name: str) -> None:
    """Store the weights as a network's own."""
    recipe = session.options.recipe
    if recipe.weights != "own":
        raise TrainingError(
            f"a hook of recipe {recipe.name!r} stores the weights of {name!r} alone, and the recipe shares one set of "
            'weights: give it weights="own"'
        )
    name = session.net.subnet(name).name
    check_finite(session)  # never weights that are not finite
    session.history.weights[name] = where = f"weights-{name}".replace(":", "-")
    session.store.put(where, model_tensors(session.net.model))


def _count(
    session: Session, step: Step, result: StepResult, location: StepLocation, snapshot: StepSnapshot | None
) -> None:
    losses, record = session.losses, session.history.rounds[-1]
    note_step(record, result.losses, made=result.made)
    if session.shares is not None:
        session.shares.give(one.subnet for one in step.passes)
    if result.rejected:
        assert snapshot is not None
        assert session.skips is not None
        snapshot.restore()
        session.history.skipped += 1
        session.skips.note(location, result.losses, session.store.standing)
        return
    if session.skips is not None:
        session.skips.in_a_row = 0
    elif (wrong := session.watch.add(location, result.losses)) is not None:
        raise nonfinite_error(session, wrong)
    for name, loss in result.losses.items():
        # summed on the device: no waiting for it
        entry = torch.stack([loss.float(), torch.ones_like(loss, dtype=torch.float32)])
        losses[name] = losses[name] + entry if name in losses else entry
    session.history.steps += 1
    session.history.passes += len(step.passes)


def _end_epoch(session: Session, rate: float) -> None:
    position, optimization = session.position, session.optimization
    assert optimization is not None
    check_finite(session)
    losses = {name: float(total / count) for name, (total, count) in session.losses.items()}
    record = session.history.rounds[-1]
    record.losses.append(losses)
    record.learning_rates.append(optimization.rate)
    epoch = position.epoch
    position.epoch, position.step, session.losses = epoch + 1, 0, {}
    session.broadcast_buffers()
    _keep_rewind_point(session)
    save_if_due(session)
    emit(session, EpochEnded(position.round, epoch, losses, record.learning_rates[-1], rate))


def _end_round(session: Session) -> None:
    """Keep the round's weights, and measure its networks."""
    check_finite(session)
    position, options, net = session.position, session.options, session.net
    k, recipe = position.round, options.recipe
    own = recipe.weights == "own"
    finished = k > options.rounds or recipe.rounds == "one"  # all networks are measured right after
    if not finished and session.data.held_out is not None:
        save(session)  # measuring runs the user's code, which may fail or never return
    if session.average is not None:
        session.average.load()
    if 0 < k <= options.rounds or own:
        session.store.put(f"round-{k:02d}", model_tensors(net.model))
    if own:
        names = session.history.rounds[-1].networks or [DENSE]
        session.history.weights.update(dict.fromkeys(names, f"round-{k:02d}"))
    metrics = {} if finished else _measure(session, k)
    session.history.rounds[-1].metrics = metrics
    if metrics:
        log.info("round %d of %d: %s", k, options.rounds, ", ".join(f"{n} {m:.4f}" for n, m in metrics.items()))
    if k > options.rounds:
        position.phase = "finish"
    else:
        position.phase, position.round = ("merge", k) if k == options.rounds else ("train", k + 1)
    position.entered, position.epoch, position.step = False, 0, 0
    session.optimization = None
    if session.average is not None:
        session.average.end()
    save(session)
    emit(session, RoundEnded(k, metrics))


def _measure(session: Session, k: int) -> dict[str, float]:
    """Held-out metric of a round's networks, statistics recalibrated."""
    net = session.net
    if session.data.held_out is None:
        return {}
    kept = {name: tensor.clone() for name, tensor in model_tensors(net.model).items()}
    names = dict.fromkeys([DENSE, *session.context_at(k, 0).names])
    tracked = dict(net.statistics)
    try:
        metrics = {name: displayed(session, score(session, name).value) for name in names}
    except BaseException:  # the run is stopped, and saves what it had before
        net.statistics.clear()
        net.statistics.update(tracked)
        load_tensors(net.model, kept)
        raise
    net.statistics.clear()  # of these weights; the merged ones get their own
    load_tensors(net.model, kept)
    return metrics
