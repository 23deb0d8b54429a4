"""The rounds: prune by unified mask generation, rewind, co-train (paper, section 3)."""

from __future__ import annotations

import logging
import time

import torch
from torch import Tensor

from ..errors import TrainingError
from ..masks import Mask
from .batches import draw, to_device
from .events import EpochEnded, RoundEnded, RoundStarted, StepDone
from .history import RoundHistory
from .optimization import Optimization
from .pivot import pivot
from .session import Session, load_tensors, model_tensors, pack_masks
from .stepper import Stepper

__all__ = ["train_rounds"]

log = logging.getLogger(__name__)

REWIND = "rewind"


def train_rounds(session: Session) -> None:
    """Train all rounds that are left, from wherever the run stands."""
    options = session.options
    stepper = Stepper(
        session.net,
        options.forward_fn,
        options.loss_fn,
        options.distill_fn,
        options.distill_weight,
        session.classes,
    )
    while session.position.phase == "train":
        if session.position.entered:
            _resume_round(session)
        else:
            _enter_round(session)
        _train_round(session, stepper)
        _end_round(session)


def _enter_round(session: Session) -> None:
    """Make the round's masks from the weights that the one before ended with, then rewind."""
    position, options, store = session.position, session.options, session.store
    k = position.round
    if k > 0:
        if k == 1 and options.start == "pretrained":
            store.put(REWIND, model_tensors(session.net.model))
        store.put(f"masks-{k:02d}", pack_masks(_make_masks(session, k)))
        load_tensors(session.net.model, store.get(REWIND))
    session.optimization = Optimization.begin(session.net.model, options)
    if k > 0 and session.rewound is not None:
        session.optimization.load_state_dict(session.rewound)
    position.entered = True
    position.epoch, position.step = options.epochs_of(k).start, 0
    session.losses = {}
    names = [name for names in session.networks(k) for name in names]
    session.history.rounds.append(RoundHistory(k, names))
    _keep_rewind_point(session)
    session.save()
    session.emit(RoundStarted(k, tuple(names), len(options.epochs_of(k))))


def _resume_round(session: Session) -> None:
    assert session.resumed is not None
    session.optimization = Optimization.begin(session.net.model, session.options)
    session.optimization.load_state_dict(session.resumed)
    session.resumed = None
    k = session.position.round
    names = session.history.rounds[-1].networks
    session.emit(RoundStarted(k, tuple(names), len(session.options.epochs_of(k))))


def _make_masks(session: Session, k: int) -> dict[str, Mask]:
    """Masks of the subnets that are new in a round, each pattern seeing those made before it."""
    net = session.net
    patterns = {p.name: p for p in net.patterns}
    before = set(session.names(k - 1))
    new: dict[str, Mask] = {}
    made: dict[str, Mask] = {}
    for pattern, subnets in session.plan[k - 1].items():
        levels = [s.name for s in patterns[pattern].subnets()]
        for subnet in subnets:
            if subnet.name not in before:
                level = levels.index(subnet.name)
                previous = net.masks[levels[level - 1]] if patterns[pattern].nested and level else None
                new[subnet.name] = net.make_masks(subnet, previous, dict(made))
                net.set_mask(subnet.name, new[subnet.name])
        if subnets:
            made[pattern] = net.masks[subnets[-1].name]
    return new


def _keep_rewind_point(session: Session) -> None:
    position, options = session.position, session.options
    if position.round != 0 or position.epoch != options.rewind_epoch:
        return
    session.store.put(REWIND, model_tensors(session.net.model))
    if options.rewind_schedule:
        session.rewound = session.optimization_state()


def _train_round(session: Session, stepper: Stepper) -> None:
    position, options, optimization = session.position, session.options, session.optimization
    assert optimization is not None
    k = position.round
    patterns = session.networks(k)
    session.net.model.train()
    started, ran = time.monotonic(), 0
    while position.epoch < options.epochs:
        session.set_generators()
        _set_epoch(session, (k - options.first_round) * options.epochs + position.epoch)
        batches = draw(session.train_loader, (options.seed, "epoch", k, position.epoch), options.steps_per_epoch)
        for i, batch in enumerate(session.guarded(batches)):
            if i < position.step:
                continue
            step = (position.epoch - options.epochs_of(k).start) * options.steps_per_epoch + i
            name = pivot(step, patterns)
            session.seed("step", k, position.epoch, i)
            loss = stepper.step(name, to_device(batch, session.device), optimization.optimizer)
            optimization.scheduler.step()
            _add_loss(session.losses, name, loss)
            position.step = i + 1
            ran += 1
            if session.due():
                done = options.steps_before(k) + step + 1
                rate = ran / max(time.monotonic() - started, 1e-9)
                session.emit(StepDone(k, position.epoch, i + 1, done, options.total_steps, rate, name))
        if position.step == 0:
            raise TrainingError("train_loader gave no batches in this epoch: it must be iterable again and again")
        _end_epoch(session, ran / max(time.monotonic() - started, 1e-9))


def _end_epoch(session: Session, rate: float) -> None:
    position, optimization = session.position, session.optimization
    assert optimization is not None
    losses = {name: float(total / count) for name, (total, count) in session.losses.items()}
    for name, loss in losses.items():
        if not loss - loss == 0:  # infinite or not a number
            raise TrainingError(
                f"the training loss of {name} became {loss} in round {position.round}, epoch {position.epoch}: lower "
                "the learning rate, or look for values in the data that are not finite"
            )
    record = session.history.rounds[-1]
    record.losses.append(losses)
    record.learning_rates.append(optimization.rate)
    epoch = position.epoch
    position.epoch, position.step, session.losses = epoch + 1, 0, {}
    session.keep_generators()
    _keep_rewind_point(session)
    session.save_if_due()
    session.emit(EpochEnded(position.round, epoch, losses, record.learning_rates[-1], rate))


def _end_round(session: Session) -> None:
    """Keep the round's weights, and measure its networks."""
    position, options, net = session.position, session.options, session.net
    k = position.round
    if k > 0:
        session.store.put(f"round-{k:02d}", model_tensors(net.model))
    metrics = {}
    if session.held_out is not None:
        kept = {name: tensor.clone() for name, tensor in model_tensors(net.model).items()}
        names = dict.fromkeys(["dense", *(n for names in session.networks(k) for n in names)])
        metrics = {name: session.readable(session.score(name).value) for name in names}
        net.statistics.clear()  # of these weights; the merged ones get their own
        load_tensors(net.model, kept)
    session.history.rounds[-1].metrics = metrics
    log.info("round %d of %d: %s", k, options.rounds, ", ".join(f"{n} {m:.4f}" for n, m in metrics.items()))
    last = k == options.rounds
    position.phase, position.round = ("merge", k) if last else ("train", k + 1)
    position.entered, position.epoch, position.step = False, 0, 0
    session.optimization = None
    session.save()
    session.emit(RoundEnded(k, metrics))


def _set_epoch(session: Session, epoch: int) -> None:
    """Tell samplers that shuffle by the epoch's number (distributed ones) which it is."""
    loader = session.train_loader
    for part in (loader, getattr(loader, "sampler", None)):
        if callable(set_epoch := getattr(part, "set_epoch", None)):
            set_epoch(epoch)


def _add_loss(losses: dict[str, Tensor], name: str, loss: Tensor) -> None:
    entry = torch.stack([loss.float(), torch.ones_like(loss, dtype=torch.float32)])  # summed where it is: no waiting
    losses[name] = losses[name] + entry if name in losses else entry
