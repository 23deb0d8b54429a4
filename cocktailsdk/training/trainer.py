"""CoTrainer: one training run that gives every network of the bundle."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from os import PathLike
from typing import Any, Generic, Literal, TypeVar

import torch

from ..errors import TrainingError
from ..net.costs import stored_params
from ..net.subnet_model import SubnetModel
from ..patterns.base import DENSE
from ..utils.devices import device_of
from ..utils.fsdp import sharded
from ..utils.losses import LossFn
from ..utils.modes import modes_restored
from ..utils.undo import forked
from .budget import RunLength
from .data.batches import CachedBatches
from .data.loader_state import generator_states, refuse_spent, set_generator_states
from .distributed.launch import connected, launched, shard
from .distributed.shared_store import SharedStore
from .distributed.sharing import held_out_loader
from .ending import ending
from .events import Callback, Finished
from .infer_task import choose_metric, infer_task
from .interrupt import Interrupts
from .keywords import current_keywords
from .merge.merging import finish, merge_rounds
from .metrics import MetricFn, mean_score
from .open_session import open_session, training_started
from .optimizers import OptimizerFactory, OptimizerName, optimizer_line
from .options import Loaders, TrainerArguments, build_options
from .planning import Costs, Plan, length_for, measure, plan
from .range_test import LearningRateSuggestion, suggest_rate
from .recipes import Recipe
from .refit import refit_head
from .rounds import train_rounds
from .schedules import ScheduleFactory
from .session import Session
from .settings import (
    BatchSettings,
    DistillationSettings,
    EvaluationSettings,
    ExecutionSettings,
    OutputSettings,
    RoundSettings,
    Settings,
)
from .state.configuration import describe, fingerprint, settings_line, stored_configuration
from .state.history import History
from .state.provenance import note_training
from .state.store import FolderStore, MemoryStore, Store
from .step.distill import Classes
from .step.execution import without_autocast
from .user_code import LoaderFailed, emit

__all__ = ["CoTrainer"]

log = logging.getLogger(__name__)

NetT = TypeVar("NetT", bound=SubnetModel)


class CoTrainer(Generic[NetT]):
    """Trains the dense network and all its subnets as one set of weights (Sparse Cocktail, ICML 2024).

    From scratch, the default is the recipe ``"cocktail"``. Round 0 trains the dense network. Every later round prunes
    by unified mask generation and co-trains that round's subnets with the dense network, which teaches them. Then all
    networks are co-trained for as many steps again (finishing).

    From trained weights (``start="pretrained"``), the default is the recipe ``"pretrained"``. All masks are made at
    once, and all networks are co-trained in one round. A frozen copy of the given weights teaches, and the subnets
    whose held-out loss is furthest from it get most passes. Then the classifier head is refitted.

    At the end every network gets its own batch-norm statistics. Other recipes are chosen by name, see
    :mod:`cocktailsdk.training.recipes`.

    The keywords up to ``callbacks`` are those that most runs need. All others come in six groups, see
    :mod:`cocktailsdk.training.settings`.

    Args:
        net: From :func:`~cocktailsdk.sparsify`. Its masks are made anew.
        train_loader: Any iterable of batches that can be gone through again and again. Tensors, ``(inputs, target)``
            and mappings are understood, of tensors or NumPy arrays; others need ``BatchSettings.forward_fn``.
        loss_fn: ``loss_fn(output, target) -> scalar``, or a mapping of scalars, which are added; ``target`` is ``None``
            where the batch has none. ``None`` takes the loss that the model computes itself (``output.loss``,
            ``output["loss"]``, or a mapping of losses).
        val_loader: Held-out batches: needed for merging, and measures every network.
        metric: ``metric(output, target) -> scores``: a tensor with one number for each example (or token, or pixel),
            whose mean over all batches is the metric; or a scalar, the batch's mean. Default: accuracy for
            classification, otherwise the negative loss; labels that the loss ignores do not count. A metric that is not
            finite is recorded as NaN, and never chosen.
        epochs: Epochs of every round. Default: the paper's 150; 10 for the recipe ``"pretrained"``, which has one
            round. A fraction such as ``0.5`` is rounded to
            whole optimizer steps, at least one. Finishing is added to the rounds; ``Recipe.finishing`` sets its length.
        total_steps: A budget of optimizer steps for the whole run, instead of ``epochs``; exactly so many are made.
            Finishing gets the recipe's share of them, rounds the rest in equal parts.
        total_hours: A budget of hours instead of ``epochs``, merging included: a few steps are measured. A recipe with
            one round then makes as many optimizer steps as fit; with several, every round gets as many whole epochs as
            fit. A resumed run keeps its number of steps or epochs.
        start: ``"scratch"``; or ``"pretrained"`` if the weights of ``net`` are trained. No round then trains the dense
            network alone.
        recipe: What is done: a name from :func:`~cocktailsdk.training.recipes.recipes`, or a
            :class:`~cocktailsdk.training.recipes.Recipe` of your own. Default: ``"cocktail"`` from scratch, otherwise
            ``"pretrained"``. ``"paper"`` is the method as published.
        optimizer: ``"sgd"``, ``"adamw"``, or ``optimizer(parameters) -> Optimizer``, called once a round; one that
            steps without a closure. Default: the paper's SGD with momentum 0.9, weight decay 1e-4 and rate 0.1, or 0.01
            from pretrained weights. A recipe with ``optimizer_defaults="by model"`` looks at a pretrained model: SGD
            with Nesterov momentum if it has batch norms, and AdamW if it has layer norms and no batch norms. See
            :mod:`cocktailsdk.training.optimizers` for rates. The run logs its choice.
        learning_rate: Replaces the rate of a default optimizer, or of one that is given by name.
        schedule: ``schedule(optimizer, steps) -> LRScheduler``, called once a round with the round's optimizer steps;
            it is stepped after *every optimizer step*. Default: the paper's cosine with warm restarts; for the
            recipe ``"pretrained"`` one cosine to zero. See
            :mod:`cocktailsdk.training.schedules`.
        out_dir: Where the run keeps its state, in ``state/``. With it, the same call resumes after a crash or Ctrl-C,
            bit-identically to never having stopped. One run at a time may train there. Without it, a run that fails
            after training is saved to a temporary folder, which the error names.
        device: Where to train; the net is moved there. Default: where the model is; of several processes each has its
            own.
        seed: Of all randomness. The global generators are left as they were.
        callbacks: Called with every event; see :mod:`cocktailsdk.training.events`.
        distillation: How the teacher teaches: weight, loss, temperature.
        rounds: How many rounds there are, where they begin, how they are merged.
        evaluation: How networks are measured: direction of the metric, batches for statistics.
        batches: How batches are used: ``forward_fn``, length of an epoch, several processes.
        execution: How a step is computed: mixed precision, accumulation, clipping, averaging, NaN, Accelerate.
        output: How often the run saves and reports, and what describes its data.
        **deprecated: Settings under their names of the version before, with a ``DeprecationWarning``.

    Attributes:
        net: The networks.
        history: What came out of the run so far.
        configuration: What the run was asked to do, as JSON values.
        fingerprint: SHA-256 of the configuration.
        ranks: The processes that share the run: ``ranks.is_main`` where files are to be written.

    Raises:
        TrainingError: For arguments that make no sense, each named.
        TypeError: For an unknown keyword; names the nearest.

    Example:
        ```python
        net = cocktail.sparsify(model, example_inputs=(x,))
        trainer = cocktail.CoTrainer(net, train_loader, F.cross_entropy, val_loader=val_loader, epochs=20)
        trainer.fit()
        ```
    """

    def __init__(
        self,
        net: NetT,
        train_loader: Iterable[Any],
        loss_fn: LossFn | None = None,
        *,
        val_loader: Iterable[Any] | None = None,
        metric: MetricFn | None = None,
        epochs: float | None = None,
        total_steps: int | None = None,
        total_hours: float | None = None,
        start: Literal["scratch", "pretrained"] = "scratch",
        recipe: str | Recipe | None = None,
        optimizer: OptimizerFactory | OptimizerName | None = None,
        learning_rate: float | None = None,
        schedule: ScheduleFactory | None = None,
        out_dir: str | PathLike[str] | None = None,
        device: str | torch.device | None = None,
        seed: int = 0,
        callbacks: Sequence[Callback] = (),
        distillation: DistillationSettings | None = None,
        rounds: RoundSettings | None = None,
        evaluation: EvaluationSettings | None = None,
        batches: BatchSettings | None = None,
        execution: ExecutionSettings | None = None,
        output: OutputSettings | None = None,
        **deprecated: Any,
    ) -> None:
        if not isinstance(net, SubnetModel):
            raise TrainingError(f"net must be what cocktailsdk.sparsify() returned, got {type(net).__name__}")
        groups: dict[str, Any] = {
            "distillation": distillation,
            "rounds": rounds,
            "evaluation": evaluation,
            "batches": batches,
            "execution": execution,
            "output": output,
        }
        groups = current_keywords({**groups, **deprecated}, caller="CoTrainer")
        self._arguments = TrainerArguments(
            train_loader=train_loader,
            loss_fn=loss_fn,
            val_loader=val_loader,
            metric=metric,
            epochs=epochs,
            total_steps=total_steps,
            total_hours=total_hours,
            start=start,
            recipe=recipe,
            optimizer=optimizer,
            learning_rate=learning_rate,
            schedule=schedule,
            out_dir=out_dir,
            device=device,
            seed=seed,
            callbacks=callbacks,
            settings=Settings(**{name: group for name, group in groups.items() if group is not None}),
        )
        self.net = net
        self.history = History()
        self._classes: Classes | None = None
        self._done: Session | None = None
        self._prepare()

    def _prepare(self) -> None:
        """Work out what the run does. Several processes must do all of this, in this order."""
        arguments, net = self._arguments, self.net
        self._plan = arguments.named_recipe.plan(net.patterns, arguments.settings.rounds.count)
        self._launch = launched(arguments.settings.execution.accelerator, arguments.device)
        self.ranks = self._launch.ranks
        shard(net.model, self._launch)
        self._device = self._launch.device or device_of(net.model)
        self._loaders = Loaders.of(arguments, self.ranks)
        hours = arguments.total_hours
        length = None if hours is None else self._resumed_length(hours)
        given = arguments, net.model, self._plan, self._loaders, self._launch
        self._options = build_options(*given, length)
        if hours is not None and length is None:
            with self._measured() as (session, costs):
                length = length_for(session, costs, hours)
            self._options = build_options(*given, length)
        self.configuration = describe(net, self._options, arguments.settings.output.config)
        self.fingerprint = fingerprint(self.configuration)

    def _resumed_length(self, hours: float) -> RunLength | None:
        """The length of a run in this folder that had the same budget of hours."""
        if self._arguments.out_folder is None:
            return None
        folder = self._arguments.out_folder / "state"
        training = self.ranks.from_main(lambda: stored_configuration(folder)).get("training", {})
        if training.get("total_hours") != hours or "epochs" not in training:
            return None
        steps = training.get("steps")  # of a recipe with one round, unless they make whole epochs
        return RunLength(training["epochs"]) if steps is None else RunLength(total_steps=sum(steps))

    def fit(self) -> NetT:
        """Train all rounds, merge them, and give every network its statistics and metric.

        With ``out_dir`` a run that was stopped is resumed, and one that is done is loaded. Ctrl-C and SIGTERM finish
        the step, save, and end the run; a second one ends it at once.

        Returns:
            The net, dense network active, in the mode in which it was.

        Raises:
            TrainingError: Where training cannot start or resume; says what to do.
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
            self._store().held() as store,
        ):
            session = self._open(interrupts, store)
            self.history = session.history
            with ending(session, self.configuration):
                if session.position.phase != "done":
                    chosen = optimizer_line(self.configuration["optimizer"], self._options.optimizer_reason)
                    log.info("optimizer: %s", chosen)
                    log.info("settings: %s", settings_line(self.configuration))
                    emit(session, training_started(session))
                    train_rounds(session, "train")
                    merge_rounds(session)
                    train_rounds(session, "finishing")
                    refit_head(session)
                    finish(session)
                shown = {key: self.configuration[key] for key in ("training", "optimizer", "schedule", "config")}
                note_training(net, {"fingerprint": self.fingerprint, **shown}, self._arguments.train_loader)
                session.execution = None  # the session stays for using(), and shall not hold the DDP wrapper
                self._done = session
                emit(session, Finished(dict(net.metrics), session.history.seconds))
        return net

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
            batches = CachedBatches(loader, (self._options.seed, "evaluation"), self._device, again=again)
            if self._options.metric is None and self._classes is None:
                refuse_spent(loader, "loader")  # inferring the task takes its first batch
                self._classes = infer_task(net.model, batches, self._options)
            metric = choose_metric(self._classes, self._options)
            chosen = [DENSE, *(n for n in net.names if n in net.masks)] if names is None else names
            out = {}
            for name in chosen:
                with self.using(name):
                    score = mean_score(net.model, batches, self._options.forward_fn, metric, ranks, check=True)
                out[net.subnet(name).name] = score.number
        return out

    @contextmanager
    def using(self, name: str) -> Iterator[NetT]:
        """Make a network active for a while, with the weights that it ended with.

        As ``net.using(name)``; but where the recipe gives a network weights of its own (``"imp"``, ``"ac/dc"``), which
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
        """How many parameters hold all networks: those of the model where all share one set, and private tensors."""
        return stored_params(self.net.coupling, self.net.masks, self.history.weights, self.net.private)

    def plan(self) -> Plan:
        """What the run will do, how long it takes and what memory it needs, measured on a few steps.

        Nothing is changed: weights, statistics and random generators are put back.
        """
        with self._measured() as (session, costs):
            return plan(session, costs)

    def suggest_lr(
        self, steps: int = 60, *, lowest: float | None = None, highest: float | None = None
    ) -> LearningRateSuggestion:
        """Suggest a learning rate: train a few steps while the rate rises, and see where the loss is lowest.

        The steps train the networks of the first round as the recipe does, with the loss of training, distillation
        included. Nothing is changed: weights, statistics, loaders and random generators are put back. The same seed
        gives the same suggestion.

        Where the loss does not fall clearly, the suggestion is the optimizer's own rate, and says so. Above a suggested
        rate that is called ``capped``, the loss of the dense network, or the mean, rises clearly.

        Args:
            steps: Optimizer steps of the test. It takes about as long as three times so many steps of training.
            lowest: The first rate. Default: the optimizer's own divided by 30.
            highest: The last rate. Default: 30 times the optimizer's own.

        Raises:
            TrainingError: The loss is not finite or rises at every rate, or there are several processes; says what to
                type.

        Example:
            ```python
            suggestion = cocktail.CoTrainer(net, train_loader, loss_fn, start="pretrained").suggest_lr()
            print(suggestion)
            trainer = cocktail.CoTrainer(
                net, train_loader, loss_fn, start="pretrained", learning_rate=suggestion.rate
            )
            ```
        """
        with self._dry_session() as session:
            return suggest_rate(session, steps=steps, lowest=lowest, highest=highest)

    @contextmanager
    def _measured(self) -> Iterator[tuple[Session, Costs]]:
        with self._dry_session() as session:
            yield session, measure(session)

    @contextmanager
    def _dry_session(self) -> Iterator[Session]:
        """A session of which nothing is kept; the net's weights are put back by what is done inside."""
        self.net.switch(DENSE)
        self.net.to(self._device)
        states = generator_states(self._loaders.train)
        try:
            with without_autocast(self._device), forked():
                session = self._open(Interrupts(), MemoryStore())
                try:
                    yield session
                except LoaderFailed as failed:
                    raise TrainingError(str(failed)) from failed.__cause__
        finally:
            set_generator_states(self._loaders.train, states)

    def _store(self) -> Store | SharedStore:
        folder = self._arguments.out_folder

        def make() -> Store:
            return MemoryStore() if folder is None else FolderStore(folder / "state", self.configuration)

        return make() if self.ranks.world == 1 else SharedStore(self.ranks, make, sharded=sharded(self.net.model))

    def _open(self, interrupts: Interrupts, store: Store | SharedStore) -> Session:
        session = open_session(
            self.net, self._options, self._plan, self._loaders, self._launch, self._device, store, interrupts
        )
        self._classes = session.classes
        return session
