"""How long a run will take and what memory it needs, measured on a few steps."""

from __future__ import annotations

import copy
import itertools
import math
import timeit
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import mean

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from ..errors import TrainingError
from ..patterns.base import DENSE
from ..utils.fsdp import local
from ..utils.modes import modes_restored, train_as_handed
from .budget import finishing_epochs
from .evaluation import score
from .need import held_out_losses
from .optimization import Optimization
from .recipes import Step, SubnetPass
from .round_plan import step_of
from .session import Session, load_tensors, model_tensors
from .step.engine import Stepper

__all__ = ["Costs", "Plan", "epochs_for", "measure", "plan"]

REPEATS = 2
LOOKS = 2520  # steps of a round that a plan looks at; whole cycles of up to ten networks


@dataclass(frozen=True)
class Costs:
    """What the parts of a run cost here.

    Attributes:
        dense_step: Seconds of a dense optimizer step.
        sparse_step: Seconds of a sparse one, the teacher's pass included; the mean over one subnet of each pattern.
        candidate: Seconds to recalibrate a network and measure it on the held-out data; 0 without such data.
        measuring: Seconds to measure the need of all networks once; 0 if the recipe measures none.
        memory: Bytes at the peak of a step: weights, gradients, optimizer, masks and activations.
    """

    dense_step: float
    sparse_step: float
    candidate: float
    memory: int
    measuring: float = 0.0


@dataclass(frozen=True)
class Plan:
    """What a run will do.

    Attributes:
        rounds: Number of the last round.
        epochs: Epochs of every round.
        finishing_epochs: Epochs after merging.
        steps: Optimizer steps in all.
        candidates: Recalibrated networks that merging judges at most.
        seconds: How long the run takes at most, without loading data slower than training uses it.
        memory: Bytes at the peak of a step, on the model's device.
        costs: What this was computed from.
    """

    rounds: int
    epochs: int
    finishing_epochs: int
    steps: int
    candidates: int
    seconds: float
    memory: int
    costs: Costs


def plan(session: Session, costs: Costs) -> Plan:
    """The whole run at these costs."""
    options = session.options
    return Plan(
        rounds=options.rounds,
        epochs=options.epochs,
        finishing_epochs=options.finishing_epochs,
        steps=options.all_steps,
        candidates=_candidates(session),
        seconds=_training(session, costs) + _after(session, costs),
        memory=costs.memory,
        costs=costs,
    )


def epochs_for(session: Session, costs: Costs, hours: float) -> int:
    """Epochs of every round such that the run takes at most so many hours.

    Args:
        session: Of the run with any number of epochs.
        costs: As measured.
        hours: The budget, merging included.

    Raises:
        TrainingError: Where not even one epoch fits.
    """
    options = session.options
    rounds = options.rounds + 1 - options.first_round

    def seconds(epochs: int) -> float:
        finishing = finishing_epochs(epochs, rounds, options.recipe.finishing)
        run = replace(session, options=replace(options, epochs=epochs, finishing_epochs=finishing, rewind_epoch=0))
        return _training(run, costs)

    left = 3600 * hours - _after(session, costs)
    if seconds(1) > left:
        raise TrainingError(
            f"total_hours={hours} is too little: merging takes up to {_after(session, costs) / 3600:.2g} hours and one "
            f"epoch of every round {seconds(1) / 3600:.2g}"
        )
    # Searched bit by bit, from a power of two above the estimate down. Dividing would not do: the epochs of finishing
    # are rounded, so seconds() is not proportional.
    epochs, step = 1, max(1, 1 << math.floor(left / seconds(1)).bit_length())
    while step:
        if seconds(epochs + step) <= left:
            epochs += step
        step //= 2
    return epochs


def _training(session: Session, costs: Costs) -> float:
    """Seconds of all steps: of long rounds so many are looked at, evenly spread."""
    options, recipe, total = session.options, session.options.recipe, 0.0
    for k in range(options.first_round, options.finishing_round + 1):
        steps = options.steps_of(k)
        shares = copy.deepcopy(session.shares)
        looked = [i * steps // min(steps, LOOKS) for i in range(min(steps, LOOKS))]
        if shares is not None:  # the passes that are owed build up from step to step
            looked = [*range(min(steps, LOOKS))]
        seconds = 0.0
        for i in looked:
            context = session.context_at(k, i)
            if shares is not None:
                context = replace(context, due=shares.due())
            step = step_of(recipe, context, options.rounds)
            if shares is not None:
                shares.give(one.subnet for one in step.passes)
            taught = (recipe.same_batch and step.follows) or step.passes[0].subnet == DENSE
            for one in step.passes:
                teacher = one.subnet != DENSE and not taught
                seconds += costs.sparse_step if teacher else costs.dense_step
                taught = True
        total += seconds / max(len(looked), 1) * steps
    return total + costs.measuring * (0 if session.shares is None else session.shares.measurements)


def _candidates(session: Session) -> int:
    options = session.options
    if not options.merges:
        return 0
    return len(set(options.settings.rounds.alphas)) * sum(len(session.names(k)) for k in range(2, options.rounds + 1))


def _after(session: Session, costs: Costs) -> float:
    """Seconds for merging and for the networks' own statistics."""
    return costs.candidate * (_candidates(session) + len(session.names(session.options.rounds)) + 1)


def measure(session: Session) -> Costs:
    """Run a few steps of each kind, and leave everything as it was.

    Subnets are measured under the masks that they have: every subnet has one from the start.
    """
    net, options = session.net, session.options
    kept = {name: tensor.clone() for name, tensor in model_tensors(net.model).items()}
    statistics, metrics = dict(net.statistics), dict(net.metrics)
    optimization = Optimization.begin(net.model, options, options.first_round, session.device)
    assert session.execution is not None
    stepper = Stepper.of(net, session.execution, options, session.classes)
    batches = list(itertools.islice(session.data.recalibration, options.gradient_accumulation_steps))
    names = [names[0] for names in session.networks(options.rounds).values() if names]

    def step(name: str) -> Callable[[], object]:
        return lambda: stepper.step(
            Step((SubnetPass(name),)), batches, optimization.optimizer, None, optimization.scaler
        )

    activations: dict[int, int] = {}  # bytes that autograd keeps for the backward pass, by their storage's address

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        activations[storage.data_ptr()] = storage.nbytes()
        return tensor

    with modes_restored(net):
        try:
            train_as_handed(net.model)
            with saved_tensors_hooks(keep, lambda tensor: tensor):
                step(names[0])()
            dense = _seconds(step(DENSE), session.device)
            sparse = mean(_seconds(step(name), session.device) for name in names)
            memory = _memory(session, optimization, activations)
            candidate = 0.0
            measuring = 0.0
            if session.shares is not None:
                alone = _seconds(lambda: held_out_losses(session, (names[0],)), session.device)
                measuring = alone * len(session.shares.shares)
            if session.data.held_out is not None:
                candidate = _seconds(lambda: score(session, names[-1]), session.device)
        finally:
            load_tensors(net.model, kept)
            net.model.zero_grad(set_to_none=True)
            net.statistics.clear()
            net.statistics.update(statistics)
            net.metrics.clear()
            net.metrics.update(metrics)
    costs = Costs(dense, sparse, candidate, memory, measuring)
    return session.ranks.from_main(lambda: costs)


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    """The faster of a few repetitions, after one that warms up."""

    def run_and_wait() -> None:
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return min(timeit.repeat(run_and_wait, number=1, repeat=REPEATS + 1)[1:])


def _memory(session: Session, optimization: Optimization, activations: dict[int, int]) -> int:
    net = session.net
    tensors = {name: local(tensor) for name, tensor in model_tensors(net.model).items()}
    own = {t.untyped_storage().data_ptr() for t in tensors.values()}
    weights = sum(t.nbytes for t in tensors.values())
    gradients = sum(local(p).nbytes for p in net.model.parameters() if p.requires_grad)
    state = sum(
        local(value).nbytes
        for entry in optimization.optimizer.state.values()
        for value in entry.values()
        if isinstance(value, Tensor)
    )
    shared = [names[0] for names in session.networks(session.options.rounds).values() if names]
    masks = sum(net.mask_bytes(name) for name in shared)
    # while a subnet is active, the dense values of what it masks are kept beside
    stash = max((sum(tensors[n].nbytes for n in net.masked_parameters(name)) for name in shared), default=0)
    average = 0 if session.average is None else session.average.nbytes
    frozen = None if session.execution is None else session.execution.frozen
    teacher = 0 if frozen is None else frozen.nbytes
    saved = sum(n for p, n in activations.items() if p not in own)
    return weights + gradients + state + masks + stash + average + teacher + saved
