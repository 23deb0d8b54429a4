"""CoTrainer: one training run that gives every network of the bundle."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ..errors import TrainingError
from ..net import CocktailNet
from ..patterns import rounds_of
from ..patterns.base import DENSE
from .batches import HeldBatches, epoch_length, generator_states, set_generator_states
from .configuration import describe
from .distill import Classes, DistillFn, find_classes, no_soft_loss, untouched_buffers
from .events import Callback, Finished, TrainingStarted
from .forward import ForwardFn, LossFn, default_forward, loss_of
from .history import History, Position
from .interrupt import Interrupts
from .merging import finish, merge_rounds
from .metrics import MetricFn, accuracy, mean_score
from .options import OptimizerFactory, Options, default_optimizer
from .randomness import forked, seed_everything
from .rounds import train_rounds
from .schedules import ScheduleFactory, cosine_restarts
from .search import ALPHAS
from .session import Session
from .state import FolderStore, MemoryStore, Store, fingerprint

__all__ = ["CoTrainer"]


class CoTrainer:
    """Trains the dense network and all its subnets as one set of weights (Sparse Cocktail, ICML 2024).

    Round 0 trains the dense network. Every later round prunes by unified mask generation, rewinds the weights, and
    co-trains that round's subnets with the dense network, which teaches them. At the end the rounds' weights are
    merged, and every network gets its own batch-norm statistics.

    Args:
        net: From :func:`~cocktailsdk.sparsify`. Its masks are made anew.
        train_loader: Any iterable of batches that can be gone through again and again. Tensors, ``(inputs, target)``
            and mappings are understood; for others give ``forward_fn``.
        loss_fn: ``loss_fn(output, target) -> scalar``; ``target`` is ``None`` where the batch has none. ``None``
            takes the loss that the model computes itself (``output.loss``, ``output["loss"]``, or a mapping of
            losses).
        val_loader: Held-out batches: needed for merging, and measures every network.
        metric: ``metric(output, target) -> scores``: a tensor with one number for each example (or token, or pixel),
            whose mean over all batches is the metric. Default: accuracy for classification, otherwise the negative
            loss.
        metric_mode: ``"max"`` where more is better, ``"min"`` where less is.
        forward_fn: ``forward_fn(model, batch) -> (output, target)``: how a batch is used. Found by itself for the
            forms above.
        distill_fn: ``distill_fn(student_output, teacher_output) -> scalar``. Found by itself (soft cross-entropy)
            for classification and language models with integer labels; needed elsewhere unless ``distill_weight=0``.
        distill_weight: Share of the distillation loss on sparse steps; 0 for none.
        optimizer: ``optimizer(parameters) -> Optimizer``, called once a round. Default: the paper's SGD with momentum
            0.9, weight decay 1e-4 and rate 0.1, or 0.01 from pretrained weights.
        schedule: ``schedule(optimizer, steps) -> LRScheduler``, called once a round with the round's optimizer steps;
            it is stepped after *every optimizer step*. Default: the paper's cosine with warm restarts. See
            :mod:`cocktailsdk.training.schedules`.
        epochs: Epochs of every round (paper, CIFAR-10: 150).
        total_steps: A budget of optimizer steps for all rounds together, instead of ``epochs``: every round gets as
            many whole epochs as fit.
        rewind_epoch: The rounds rewind to the weights after so many epochs of round 0. Default: 7 of 150.
        rewind_schedule: Whether optimizer and schedule too go on from there, leaving a round ``epochs - rewind_epoch``
            epochs; by default they begin anew with every round, from the rewound weights.
        rounds: Number of rounds after round 0. Default: the largest number of levels of a pattern.
        start: ``"scratch"``; or ``"pretrained"``, where the weights as given are the rewind point and round 0 is
            skipped.
        merge: Whether to merge the rounds; without, the last round's weights are the result.
        alphas: The shares that merging tries.
        recalibration_batches: Training batches from which batch-norm statistics are computed.
        steps_per_epoch: Batches of an epoch. Default: the loader's length.
        out_dir: Where the run keeps its state, in ``state/``. With it, the same call goes on after a crash or Ctrl-C,
            bit-identically to never having stopped.
        device: Where to train; the net is moved there. Default: where the model is.
        seed: Of all randomness. The global generators are left as they were.
        save_seconds: Least time between saves at ends of epochs; rounds save in any case.
        event_seconds: Least time between two events of single steps.
        callbacks: Called with every event; see :mod:`cocktailsdk.training.events`.
        config: JSON values that stand for what cannot be seen from here (the data, say). Part of the fingerprint.

    Attributes:
        net: The networks.
        history: What came out of the run so far.
        fingerprint: SHA-256 of the configuration.

    Raises:
        TrainingError: For arguments that make no sense, each named.

    Example:
        ```python
        net = cocktail.sparsify(model, example_inputs=(x,))
        trainer = cocktail.CoTrainer(net, train_loader, F.cross_entropy, val_loader=val_loader, epochs=20)
        trainer.fit()
        ```
    """

    def __init__(
        self,
        net: CocktailNet,
        train_loader: Iterable[Any],
        loss_fn: LossFn | None = None,
        *,
        val_loader: Iterable[Any] | None = None,
        metric: MetricFn | None = None,
        metric_mode: Literal["max", "min"] = "max",
        forward_fn: ForwardFn | None = None,
        distill_fn: DistillFn | None = None,
        distill_weight: float = 0.5,
        optimizer: OptimizerFactory | None = None,
        schedule: ScheduleFactory | None = None,
        epochs: int | None = None,
        total_steps: int | None = None,
        rewind_epoch: int | None = None,
        rewind_schedule: bool = False,
        rounds: int | None = None,
        start: Literal["scratch", "pretrained"] = "scratch",
        merge: bool = True,
        alphas: Sequence[float] = ALPHAS,
        recalibration_batches: int = 8,
        steps_per_epoch: int | None = None,
        out_dir: str | PathLike[str] | None = None,
        device: str | torch.device | None = None,
        seed: int = 0,
        save_seconds: float = 10.0,
        event_seconds: float = 0.1,
        callbacks: Sequence[Callback] = (),
        config: Mapping[str, Any] | None = None,
    ) -> None:
        if not isinstance(net, CocktailNet):
            raise TrainingError(f"net must be what cocktailsdk.sparsify() returned, got {type(net).__name__}")
        functions = {
            "loss_fn": loss_fn,
            "forward_fn": forward_fn,
            "distill_fn": distill_fn,
            "metric": metric,
            "optimizer": optimizer,
            "schedule": schedule,
        }
        for name, value in functions.items():
            if value is not None and not callable(value):
                made = isinstance(value, Optimizer | LRScheduler)
                hint = ": give a function that makes one, since each round needs its own" if made else ""
                raise TrainingError(f"{name} must be callable, got {type(value).__name__}{hint}")
        if merge and val_loader is None:
            raise TrainingError("merging needs held-out data: give val_loader, or merge=False")
        if start not in ("scratch", "pretrained"):
            raise TrainingError(f'start must be "scratch" or "pretrained", got {start!r}')
        self.net = net
        self._plan = rounds_of(net.patterns, rounds)
        steps = epoch_length(train_loader, steps_per_epoch)
        first = 0 if start == "scratch" else 1
        epochs = _epochs(epochs, total_steps, steps * (len(self._plan) + 1 - first))
        if rewind_epoch is None:
            rewind_epoch = 0 if start == "pretrained" else max(round(epochs * 7 / 150), min(epochs, 1))
        self._options = Options(
            loss_fn=loss_fn,
            forward_fn=forward_fn or default_forward,
            distill_fn=distill_fn,
            distill_weight=distill_weight,
            metric=metric,
            metric_mode=metric_mode,
            optimizer=optimizer or default_optimizer(start),
            schedule=schedule or cosine_restarts(),
            epochs=epochs,
            rewind_epoch=rewind_epoch,
            rewind_schedule=rewind_schedule,
            rounds=len(self._plan),
            steps_per_epoch=steps,
            start=start,
            merge=merge,
            alphas=tuple(alphas),
            recalibration_batches=recalibration_batches,
            seed=seed,
            save_seconds=save_seconds,
            event_seconds=event_seconds,
            callbacks=tuple(callbacks),
        )
        self._train_loader, self._val_loader = train_loader, val_loader
        self._device = torch.device(device) if device is not None else _device_of(net)
        self._out_dir = Path(out_dir) if out_dir is not None else None
        self._classes: Classes | None = None
        self._metric: MetricFn | None = metric
        self.configuration = describe(net, self._options, config)
        self.fingerprint = fingerprint(self.configuration)
        self.history = History()

    def fit(self) -> CocktailNet:
        """Train all rounds, merge them, and give every network its statistics and metric.

        With ``out_dir`` a run that was stopped goes on, and one that is done is loaded. Ctrl-C finishes the step,
        saves, and raises ``KeyboardInterrupt``.

        Returns:
            The net, dense network active, in the mode in which it was.

        Raises:
            TrainingError: Where training cannot start or go on; says what to do.
            KeyboardInterrupt: When the run was interrupted.
        """
        net = self.net
        net.switch(DENSE)
        net.to(self._device)
        modes = [(module, module.training) for module in net.modules()]
        try:
            with forked(), Interrupts() as interrupts:
                session = self._session(interrupts)
                self.history = session.history
                if session.position.phase != "done":
                    session.emit(self._started(session))
                    train_rounds(session)
                    merge_rounds(session)
                    finish(session)
                session.emit(Finished(dict(net.metrics), session.history.seconds))
        finally:
            for module, mode in modes:
                module.training = mode
        return net

    def evaluate(self, loader: Iterable[Any], names: Iterable[str] | None = None) -> dict[str, float]:
        """Measure networks on any data, as they stand and with their own statistics.

        Args:
            loader: Batches, of the same form as in training.
            names: Which networks; by default the dense one and all subnets that have a mask.

        Returns:
            By name the mean of the metric's scores.
        """
        net = self.net
        net.to(self._device)
        with forked():
            batches = HeldBatches(loader, (self._options.seed, "evaluation"), self._device)
            metric = self._metric or self._find_metric(batches)
            chosen = [DENSE, *(n for n in net.names if n in net.masks)] if names is None else names
            out = {}
            for name in chosen:
                with net.using(name):
                    score = mean_score(net.model, batches, self._options.forward_fn, metric)
                out[net.subnet(name).name] = float(score.value)
        return out

    def _session(self, interrupts: Interrupts) -> Session:
        options, net = self._options, self.net
        store: Store = MemoryStore()
        if self._out_dir is not None:
            store = FolderStore(self._out_dir / "state", self.configuration)
        state = store.load()
        first = generator_states(self._train_loader)
        if state is not None:
            first = state["first_generators"]
            set_generator_states(self._train_loader, first)
        recalibration = HeldBatches(
            self._train_loader, (options.seed, "recalibration"), self._device, options.recalibration_batches
        )
        if state is None:
            self._find_metric(recalibration)
        else:
            self._classes = None if state["classes"] is None else Classes(**state["classes"])
        session = Session(
            net=net,
            options=options,
            plan=self._plan,
            train_loader=self._train_loader,
            recalibration=recalibration,
            held_out=None
            if self._val_loader is None
            else HeldBatches(self._val_loader, (options.seed, "held out"), self._device),
            metric=self._choose_metric(),
            classes=self._classes,
            store=store,
            interrupts=interrupts,
            device=self._device,
            first_generators=first,
            generators=first,
            position=Position("train", options.first_round),
        )
        if state is not None:
            session.restore(state)
        return session

    def _started(self, session: Session) -> TrainingStarted:
        options, at = self._options, session.position
        done = options.total_steps
        if at.phase == "train":
            done = options.steps_before(at.round)
            if at.entered:
                done += (at.epoch - options.epochs_of(at.round).start) * options.steps_per_epoch + at.step
        return TrainingStarted(
            rounds=options.rounds,
            first_round=options.first_round,
            epochs=options.epochs,
            steps_per_epoch=options.steps_per_epoch,
            total_steps=options.total_steps,
            done_steps=done,
            resumed=bool(session.history.rounds),
        )

    def _find_metric(self, batches: Iterable[Any]) -> MetricFn:
        """See on a first batch whether this is a classification: for distillation and for the default metric."""
        options, model = self._options, self.net.model
        batch = next(iter(batches), None)
        if batch is None:
            raise TrainingError("the loader gave no batches")
        seed_everything(options.seed, "first look")
        modes = [(module, module.training) for module in model.modules()]
        model.train()
        try:
            with torch.no_grad(), untouched_buffers(model):
                output, target = options.forward_fn(model, batch)
                loss = loss_of(output, target, options.loss_fn)
        finally:
            for module, mode in modes:
                module.training = mode
        self._classes = find_classes(output, target, loss)
        if options.distill_weight and options.distill_fn is None and self._classes is None:
            raise no_soft_loss(options.loss_fn, output)
        return self._choose_metric()

    def _choose_metric(self) -> MetricFn:
        if self._metric is None:
            if self._classes is not None and self._classes.axis == 1:
                return accuracy
            sign = -1 if self._options.metric_mode == "max" else 1
            return lambda output, target: sign * loss_of(output, target, self._options.loss_fn)
        return self._metric


def _epochs(epochs: int | None, total_steps: int | None, steps_of_all: int) -> int:
    """Epochs of a round, as given or as a budget of steps allows."""
    if epochs is not None and total_steps is not None:
        raise TrainingError(f"give epochs or total_steps, not both; got epochs={epochs}, total_steps={total_steps}")
    if total_steps is None:
        return 150 if epochs is None else epochs
    if total_steps < steps_of_all:
        raise TrainingError(
            f"total_steps={total_steps} is too small: one epoch of every round takes {steps_of_all} steps"
        )
    return total_steps // steps_of_all


def _device_of(net: CocktailNet) -> torch.device:
    return next((p.device for p in net.model.parameters()), torch.device("cpu"))
