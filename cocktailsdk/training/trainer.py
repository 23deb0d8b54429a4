"""CoTrainer: one training run that gives every network of the bundle."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ..errors import TrainingError
from ..io.atomic import DiskFailed
from ..net.subnet_model import SubnetModel
from ..patterns.base import DENSE
from ..utils.devices import device_of
from ..utils.fsdp import is_sharded, sharded
from ..utils.modes import modes_restored
from ..utils.nested import default_forward
from ..utils.settings import forked
from .arguments import check_kinds, check_numbers, one_budget
from .budget import Division, divide_steps, finishing_epochs, rewind_epoch_of
from .data.batches import HeldBatches
from .data.loader_state import (
    epoch_length,
    generator_states,
    loader_length,
    make_generators,
    refuse_spent,
    set_generator_states,
)
from .data.stream import Stream
from .distributed.launch import accumulated, connected, launched, precision_of, shard
from .distributed.shared_store import SharedStore
from .distributed.sharing import held_out_loader, shared_loader
from .events import Callback, Finished, TrainingStarted
from .infer_task import choose_metric, look, try_metric
from .interrupt import Interrupts, Stopped
from .merge.alpha_search import ALPHAS
from .merge.merging import finish, merge_rounds
from .metrics import MetricFn, NothingScored, mean_score
from .options import OptimizerFactory, Options, default_optimizer
from .parameter_count import parameters_stored
from .planning import Costs, Plan, epochs_for, measure, plan
from .recipes import Recipe, recipe_named
from .rescue import rescued_bundle, saved_run
from .rounds import train_rounds
from .schedules import ScheduleFactory, cosine_restarts
from .session import CallbackFailed, LoaderFailed, Session, model_tensors
from .state.compatibility import check_state
from .state.configuration import describe, fingerprint, stored_configuration
from .state.history import History, Position
from .state.provenance import note_training
from .state.store import FolderStore, MemoryStore, Store
from .step.distill import Classes, DistillFn
from .step.execution import Execution
from .step.forward import ForwardFn, LossFn
from .step.precision import MixedPrecision, without_autocast

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["CoTrainer"]


class CoTrainer:
    """Trains the dense network and all its subnets as one set of weights (Sparse Cocktail, ICML 2024).

    Round 0 trains the dense network. Every later round prunes by unified mask generation and co-trains that round's
    subnets with the dense network, which teaches them. Then all networks are co-trained for as many steps again
    (finishing). At the end every network gets its own batch-norm statistics. That is the recipe ``"cocktail"``;
    ``"paper"`` rewinds the weights with every round and merges the rounds instead, and others are chosen by name, see
    :mod:`cocktailsdk.training.recipes`.

    Args:
        net: From :func:`~cocktailsdk.sparsify`. Its masks are made anew.
        train_loader: Any iterable of batches that can be gone through again and again. Tensors, ``(inputs, target)``
            and mappings are understood, of tensors or NumPy arrays; for others give ``forward_fn``.
        recipe: What is done: a name from :func:`~cocktailsdk.training.recipes.recipes`, or a
            :class:`~cocktailsdk.training.recipes.Recipe` of your own. ``"paper"`` is the method as published.
        loss_fn: ``loss_fn(output, target) -> scalar``, or a mapping of scalars, which are added; ``target`` is ``None``
            where the batch has none. ``None`` takes the loss that the model computes itself (``output.loss``,
            ``output["loss"]``, or a mapping of losses).
        val_loader: Held-out batches: needed for merging, and measures every network.
        metric: ``metric(output, target) -> scores``: a tensor with one number for each example (or token, or pixel),
            whose mean over all batches is the metric; or a scalar, the batch's mean. Default: accuracy for
            classification, otherwise the negative loss; labels that the loss ignores do not count. One that is not
            finite is recorded as NaN, and not chosen by.
        metric_mode: ``"max"`` where more is better, ``"min"`` where less is.
        forward_fn: ``forward_fn(model, batch) -> (output, target)``: how a batch is used. Found by itself for the
            forms above.
        distill_fn: ``distill_fn(student_output, teacher_output) -> scalar``. Found by itself (soft cross-entropy)
            for classification and language models with integer labels; needed elsewhere unless ``distill_weight=0``.
        distill_weight: Share of the distillation loss on sparse steps, where the recipe names none; 0 for none in any
            recipe.
        optimizer: ``optimizer(parameters) -> Optimizer``, called once a round; one that steps without a closure.
            Default: the paper's SGD with momentum 0.9, weight decay 1e-4 and rate 0.1, or 0.01 from pretrained weights.
        schedule: ``schedule(optimizer, steps) -> LRScheduler``, called once a round with the round's optimizer steps;
            it is stepped after *every optimizer step*. Default: the paper's cosine with warm restarts. See
            :mod:`cocktailsdk.training.schedules`.
        epochs: Epochs of every round (paper, CIFAR-10: 150). Finishing comes on top, as long as its share of the run
            says.
        total_steps: A budget of optimizer steps for the whole run, instead of ``epochs``; exactly so many are made.
            Finishing gets the recipe's share of them, rounds the rest in equal parts.
        total_hours: A budget of time instead of ``epochs``, merging included: a few steps are measured, and every round
            gets as many whole epochs as fit. A run that goes on keeps the epochs that it began with.
        rewind_epoch: The rounds rewind to the weights after so many epochs of round 0. Default: 7 of 150.
        rewind_schedule: Whether optimizer and schedule too go on from there, leaving a round ``epochs - rewind_epoch``
            epochs; by default they begin anew with every round, from the rewound weights.
        rounds: Number of rounds after round 0. Default: the largest number of levels of a pattern.
        start: ``"scratch"``; or ``"pretrained"``, where the weights as given are the rewind point and round 0 is
            skipped.
        merge: Whether to merge the rounds, where the recipe does; without, the last round's weights are the result.
        alphas: The shares that merging tries.
        recalibration_batches: Training batches from which batch-norm statistics are computed.
        steps_per_epoch: Batches of an epoch. Default: the loader's length. The next epoch goes on in the loader where
            the last one stopped, so that every batch is used whatever the number. With ``accumulate`` every optimizer
            step takes several of them.
        out_dir: Where the run keeps its state, in ``state/``. With it, the same call goes on after a crash or Ctrl-C,
            bit-identically to never having stopped. One run at a time may train there. Without it, a run that fails
            after training is saved to a temporary folder, which the error names.
        device: Where to train; the net is moved there. Default: where the model is; of several processes each has its
            own.
        accelerator: An ``accelerate.Accelerator`` of your own. Under ``torchrun`` or ``accelerate launch`` one is made
            where none is given; see the page on several processes.
        mixed_precision: ``"bf16"`` or ``"fp16"``: training passes compute in 16 bits. Weights, masks, statistics,
            metrics and merging keep the weights' own precision. Default: the accelerator's.
        accumulate: Batches of the loader that an optimizer step takes, one after the other; its gradients are those of
            the mean over all their examples. Default: the accelerator's ``gradient_accumulation_steps``, or 1.
        clip_norm: Largest norm of a step's gradients, all together; longer ones are shortened to it.
        ema: Decay of an exponential moving average of the weights, say 0.999: every round ends with the average of its
            steps' weights, which is what is measured, pruned, merged and gone on from. It takes one more copy of the
            trained weights.
        sync_batch_norm: Whether batch norms, of several processes on GPUs, normalise by all processes' examples.
        shard_loader: Whether each batch of ``train_loader`` is shared out among processes; ``False`` where the loader
            gives each its own part. Default: yes, unless the loader is seen to do that (``DistributedSampler``,
            loaders that Accelerate prepared).
        seed: Of all randomness. The global generators are left as they were.
        save_seconds: Least time between saves at ends of epochs; rounds save in any case.
        save_minutes: Most time without a save: also in the middle of an epoch, in merging, and while networks get
            their statistics.
        on_nan: What is done where a loss is infinite or no number. ``"raise"`` stops the run; which step it was is
            found without waiting for the device in each. ``"skip"`` leaves such a step out, also where only its
            gradients are not finite: weights, momentum and statistics stay as they were; it waits for the device in
            every step, and stops after 25 in a row.
        event_seconds: Least time between two events of single steps.
        callbacks: Called with every event; see :mod:`cocktailsdk.training.events`.
        config: JSON values that stand for what cannot be seen from here (the data, say). Part of the fingerprint.

    Attributes:
        net: The networks.
        history: What came out of the run so far.
        fingerprint: SHA-256 of the configuration.
        ranks: The processes that share the run: ``ranks.is_main`` where files are to be written.

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
        net: SubnetModel,
        train_loader: Iterable[Any],
        loss_fn: LossFn | None = None,
        *,
        recipe: str | Recipe = "cocktail",
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
        total_hours: float | None = None,
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
        accelerator: Accelerator | None = None,
        mixed_precision: MixedPrecision | None = None,
        accumulate: int | None = None,
        clip_norm: float | None = None,
        ema: float | None = None,
        sync_batch_norm: bool = False,
        shard_loader: bool | None = None,
        seed: int = 0,
        save_seconds: float = 10.0,
        save_minutes: float = 5.0,
        on_nan: Literal["raise", "skip"] = "raise",
        event_seconds: float = 0.1,
        callbacks: Sequence[Callback] = (),
        config: Mapping[str, Any] | None = None,
    ) -> None:
        if not isinstance(net, SubnetModel):
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
        check_numbers(
            epochs=epochs,
            total_steps=total_steps,
            total_hours=total_hours,
            rewind_epoch=rewind_epoch,
            rounds=rounds,
            recalibration_batches=recalibration_batches,
            steps_per_epoch=steps_per_epoch,
            accumulate=accumulate,
            distill_weight=distill_weight,
            clip_norm=clip_norm,
            ema=ema,
            seed=seed,
            save_seconds=save_seconds,
            save_minutes=save_minutes,
            event_seconds=event_seconds,
        )
        check_kinds(alphas=alphas, callbacks=callbacks, out_dir=out_dir)
        one_budget(epochs=epochs, total_steps=total_steps, total_hours=total_hours)
        if not isinstance(recipe, Recipe):
            recipe = recipe_named(recipe)
        refuse_spent(val_loader, "val_loader")
        if merge and recipe.merges and val_loader is None:
            raise TrainingError("merging needs held-out data: give val_loader, or merge=False")
        if start not in ("scratch", "pretrained"):
            raise TrainingError(f'start must be "scratch" or "pretrained", got {start!r}')
        self.net = net
        self._plan = recipe.plan(net.patterns, rounds)
        self._launch = launched(accelerator, device)
        self.ranks = self._launch.ranks
        shard(net.model, self._launch)
        self._train_loader, self._val_loader = train_loader, val_loader
        self._device = self._launch.device or device_of(net.model)
        self._out_dir = Path(out_dir) if out_dir is not None else None
        self._classes: Classes | None = None
        batches = self.ranks.least(epoch_length(train_loader, steps_per_epoch))
        length: int | None = batches
        if steps_per_epoch is not None:
            length = self.ranks.least(loader_length(train_loader) or 0) or None
        accumulate = accumulated(self._launch, accumulate)
        steps = -(-batches // max(accumulate, 1))
        self._shared_loader = shared_loader(train_loader, self.ranks, shard_loader)
        self._shared_held_out = None if val_loader is None else held_out_loader(val_loader, self.ranks)
        rounds_in_all = len(self._plan) + (start == "scratch" and recipe.rounds == "levels")

        def of_epochs(count: int) -> Division:
            finishing = finishing_epochs(count, rounds_in_all, recipe.finishing)
            return Division(count, finishing, rewind_epoch_of(rewind_epoch, start, count))

        # a budget of hours is turned into epochs once a step can be measured, unless the run has begun
        begun = None if total_hours is None else self._begun(total_hours)
        unknown = total_hours is not None and begun is None
        if unknown:
            division = Division(epochs=1, finishing_epochs=0, rewind_epoch=0)
        elif total_steps is not None:
            division = divide_steps(
                total_steps,
                rounds_in_all,
                recipe.finishing,
                steps,
                rewind_epoch=rewind_epoch,
                start=start,
                rewound=rewind_schedule and recipe.rewind and rounds_in_all > len(self._plan),
            )
        else:
            division = of_epochs(begun or epochs or 150)
        self._options = Options(
            recipe=recipe,
            loss_fn=loss_fn,
            forward_fn=forward_fn or default_forward,
            distill_fn=distill_fn,
            distill_weight=distill_weight,
            metric=metric,
            metric_mode=metric_mode,
            optimizer=optimizer or default_optimizer(start),
            schedule=schedule or cosine_restarts(),
            epochs=division.epochs,
            finishing_epochs=division.finishing_epochs,
            budget=division.budget,
            total_hours=total_hours,
            rewind_epoch=division.rewind_epoch,
            rewind_schedule=rewind_schedule,
            rounds=len(self._plan),
            steps_per_epoch=steps,
            start=start,
            merge=merge,
            alphas=tuple(alphas),
            recalibration_batches=recalibration_batches,
            seed=seed,
            save_seconds=save_seconds,
            save_minutes=save_minutes,
            on_nan=on_nan,
            event_seconds=event_seconds,
            callbacks=tuple(callbacks),
            precision=precision_of(self._launch, mixed_precision),
            accumulate=accumulate,
            pass_length=length,
            clip_norm=clip_norm,
            ema=ema,
            sync_batch_norm=sync_batch_norm,
        )
        if unknown:
            assert total_hours is not None
            division = of_epochs(self._epochs_for(total_hours))
            self._options = replace(
                self._options,
                epochs=division.epochs,
                finishing_epochs=division.finishing_epochs,
                rewind_epoch=division.rewind_epoch,
            )
        self.configuration = describe(net, self._options, config)
        self.fingerprint = fingerprint(self.configuration)
        self.history = History()
        self._done: Session | None = None

    def fit(self) -> SubnetModel:
        """Train all rounds, merge them, and give every network its statistics and metric.

        With ``out_dir`` a run that was stopped goes on, and one that is done is loaded. Ctrl-C and SIGTERM finish the
        step, save, and end the run; a second one ends it at once.

        Returns:
            The net, dense network active, in the mode in which it was.

        Raises:
            TrainingError: Where training cannot start or go on; says what to do.
            KeyboardInterrupt: After Ctrl-C, or where a callback raised it.
            SystemExit: After SIGTERM, with the status 143.
        """
        net = self.net
        net.switch(DENSE)
        net.to(self._device)
        with (
            modes_restored(net),
            connected(self.ranks),
            without_autocast(self._device),
            forked(),
            Interrupts() as interrupts,
            self._held_store() as store,
        ):
            session = self._session(interrupts, store)
            self.history = session.history
            with _stopping(session, self.configuration):
                if session.position.phase != "done":
                    session.emit(self._started(session))
                    train_rounds(session, "train")
                    merge_rounds(session)
                    train_rounds(session, "finishing")
                    finish(session)
                note_training(net, self._provenance(), self._train_loader)
                session.execution = None
                self._done = session
                session.emit(Finished(dict(net.metrics), session.history.seconds))
        return net

    def _provenance(self) -> dict[str, Any]:
        shown = ("training", "optimizer", "schedule", "config")
        return {"fingerprint": self.fingerprint, **{key: self.configuration[key] for key in shown}}

    def evaluate(self, loader: Iterable[Any], names: Iterable[str] | None = None) -> dict[str, float]:
        """Measure networks on any data, as they stand and with their own statistics.

        Args:
            loader: Batches, of the same form as in training; of several processes each measures its part of every
                batch, so that all must call this.
            names: Which networks; by default the dense one and all subnets that have a mask.

        Returns:
            By name the mean of the metric's scores.
        """
        net, ranks = self.net, self.ranks
        net.to(self._device)
        with without_autocast(self._device), forked():
            again = held_out_loader(loader, ranks)
            batches = HeldBatches(loader, (self._options.seed, "evaluation"), self._device, again=again)
            if self._options.metric is None and self._classes is None:
                refuse_spent(loader, "loader")  # the look takes its first batch
                self._classes = look(net.model, batches, self._options)
            metric = choose_metric(self._classes, self._options)
            chosen = [DENSE, *(n for n in net.names if n in net.masks)] if names is None else names
            out = {}
            for name in chosen:
                with self.using(name):
                    score = mean_score(net.model, batches, self._options.forward_fn, metric, ranks, check=True)
                out[net.subnet(name).name] = score.number
        return out

    @contextmanager
    def using(self, name: str) -> Iterator[SubnetModel]:
        """Make a network active for a while, with the weights that it ended with.

        As ``net.using(name)``; but where the recipe leaves a network weights of its own (``"imp"``, ``"ac/dc"``), which
        the net cannot hold beside the others', these are loaded meanwhile.

        Args:
            name: ``"dense"`` or a subnet's name.

        Raises:
            SubnetError: There is no such network.
        """
        name = self.net.subnet(name).name
        with ExitStack() as stack:
            if self._done is not None and name != DENSE and self.net.active == DENSE:
                stack.enter_context(self._done.weights_of(name))
            stack.enter_context(self.net.using(name))
            yield self.net

    @property
    def parameters_stored(self) -> int:
        """How many parameters hold all networks: those of the model where all share one set of weights."""
        return parameters_stored(self.net, self.history.weights)

    def plan(self) -> Plan:
        """What the run will do, how long it takes and what memory it needs, measured on a few steps.

        Nothing is changed: weights, statistics and random generators are put back.
        """
        with self._measured() as (session, costs):
            return plan(session, costs)

    def _epochs_for(self, hours: float) -> int:
        with self._measured() as (session, costs):
            return epochs_for(session, costs, hours)

    @contextmanager
    def _measured(self) -> Iterator[tuple[Session, Costs]]:
        self.net.switch(DENSE)
        self.net.to(self._device)
        states = generator_states(self._train_loader)
        try:
            with without_autocast(self._device), forked():
                session = self._session(Interrupts(), MemoryStore())
                try:
                    costs = measure(session)
                except LoaderFailed as failed:
                    raise TrainingError(str(failed)) from failed.__cause__
                yield session, costs
        finally:
            set_generator_states(self._train_loader, states)

    def _begun(self, hours: float) -> int | None:
        """The epochs of a run in this folder that had the same budget of hours."""
        if self._out_dir is None:
            return None
        folder = self._out_dir / "state"
        training = self.ranks.from_main(lambda: stored_configuration(folder)).get("training", {})
        return training.get("epochs") if training.get("total_hours") == hours else None

    def _store(self) -> Store | SharedStore:
        return (
            self._own_store()
            if self.ranks.world == 1
            else SharedStore(self.ranks, self._own_store, sharded=sharded(self.net.model))
        )

    def _own_store(self) -> Store:
        if self._out_dir is None:
            return MemoryStore()
        return FolderStore(self._out_dir / "state", self.configuration)

    @contextmanager
    def _held_store(self) -> Iterator[Store | SharedStore]:
        store = self._store()
        with store.held():
            yield store

    def _session(self, interrupts: Interrupts, store: Store | SharedStore) -> Session:
        options, net, ranks = self._options, self.net, self.ranks
        generators = generator_states(self._train_loader)
        state = store.load(lambda state, files, shapes: check_state(state, net, options, generators, files, shapes))
        first = ranks.from_main(lambda: generator_states(self._train_loader))
        if state is not None:
            first = state["first_generators"]
            make_generators(self._train_loader, first)
        if state is not None or ranks.world > 1:
            set_generator_states(self._train_loader, first)
        if ranks.world > 1:
            ranks.align(tensor for tensor in model_tensors(net.model).values() if not is_sharded(tensor))
        if state is None:
            classes = look(net.model, self._recalibration(), options)
            self._classes = ranks.from_main(lambda: classes)
            first = ranks.from_main(lambda: {**generator_states(self._train_loader), **first})  # and those made now
        else:
            self._classes = None if state["classes"] is None else Classes(**state["classes"])
        session = Session(
            net=net,
            options=options,
            plan=self._plan,
            train_loader=self._train_loader,
            shared_loader=self._shared_loader,
            recalibration=self._recalibration(),
            held_out=None
            if self._val_loader is None
            else HeldBatches(self._val_loader, (options.seed, "held out"), self._device, again=self._shared_held_out),
            metric=choose_metric(self._classes, options),
            classes=self._classes,
            store=store,
            interrupts=interrupts,
            device=self._device,
            first_generators=first,
            stream=Stream(
                self._train_loader,
                self._shared_loader,
                options.seed,
                size=options.accumulate,
                length=options.pass_length,
                generators=first,
            ),
            position=Position("train", options.first_round),
            ranks=ranks,
            execution=self._execution(),
        )
        if state is not None:
            session.restore(state)
        elif session.held_out is not None:
            try_metric(net.model, session.held_out, options, session.metric, ranks)
        if ranks.world > 1 and session.execution is not None and session.position.phase != "done":
            session.execution.prepare(next(iter(session.recalibration)), options.loss_fn)
        return session

    def _recalibration(self) -> HeldBatches:
        options = self._options
        return HeldBatches(
            self._shared_loader, (options.seed, "recalibration"), self._device, options.recalibration_batches
        )

    def _execution(self) -> Execution:
        options = self._options
        return Execution(
            self.net.model,
            options.forward_fn,
            ranks=self.ranks,
            precision=options.precision,
            device=self._device,
            accelerator=self._launch.accelerator,
            clip_norm=options.clip_norm,
            sync_batch_norm=options.sync_batch_norm,
        )

    def _started(self, session: Session) -> TrainingStarted:
        options, at = self._options, session.position
        done = options.steps_before(options.finishing_round)
        if at.phase in ("train", "finishing"):
            done = options.steps_before(at.round)
            if at.entered:
                done += (at.epoch - options.epochs_of(at.round).start) * options.steps_per_epoch + at.step
        elif at.phase == "finish":
            done = options.total_steps
        return TrainingStarted(
            rounds=options.rounds,
            first_round=options.first_round,
            epochs=options.epochs,
            steps_per_epoch=options.steps_per_epoch,
            total_steps=options.total_steps,
            done_steps=done,
            resumed=bool(session.history.rounds),
        )


@contextmanager
def _stopping(session: Session, configuration: Mapping[str, Any]) -> Iterator[None]:
    """Save where the run was asked to stop, or a loader, a metric, the model or a callback raised; then end it."""
    try:
        yield
    except Stopped:
        session.save(interrupted=True)
        raise session.interrupts.error() from None
    except (LoaderFailed, NothingScored) as failed:
        if session.ranks.world > 1:  # saving takes all of them, and the others' loaders did not fail
            raise TrainingError(str(failed)) from failed.__cause__
        said = str(failed).rstrip("?")
        raise TrainingError(f"{said}. {saved_run(session, configuration)}") from failed.__cause__
    except CallbackFailed as failed:
        error = failed.__cause__
        assert error is not None
        if session.ranks.world == 1:
            error.add_note(saved_run(session, configuration, tell=False))
        raise error from error.__cause__
    except DiskFailed as error:
        trained = session.position.phase in ("finish", "done")
        if not trained or session.ranks.world > 1 or (where := rescued_bundle(session.net)) is None:
            raise
        raise TrainingError(f"{error} {where}") from error.__cause__
