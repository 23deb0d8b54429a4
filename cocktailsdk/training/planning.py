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
from .budget import RunLength, epochs_in, finishing_length
from .dry_run import dry_run
from .evaluation import score
from .need import held_out_losses
from .optimization import Optimization
from .recipes import Step, SubnetPass
from .round_plan import step_of
from .session import Session, model_tensors
from .step.engine import Stepper

__all__ = ["Costs", "Plan", "length_for", "measure", "plan"]

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


def length_for(session: Session, costs: Costs, hours: float) -> RunLength:
    """The longest run that takes at most so many hours.

    A recipe with one round gets optimizer steps. One with several gets whole epochs, since its rounds are as long as
    each other and may be rewound to the end of an epoch.

    Args:
        session: Of a run of any length.
        costs: As measured.
        hours: The budget, merging included.

    Raises:
        TrainingError: Not even one step, or one epoch of every round, fits; says how many hours that takes.
    """
    options = session.options
    in_steps = options.recipe.rounds == "one"
    rounds = options.rounds + 1 - options.first_round

    def seconds(length: int) -> float:
        if in_steps:
            run = replace(options, epochs=epochs_in(length, options.steps_per_epoch), budget=(length,), rewind_epoch=0)
        else:
            finishing = finishing_length(length, rounds, options.recipe.finishing)
            run = replace(options, epochs=length, finishing_epochs=finishing, rewind_epoch=0)
        return _training(replace(session, options=run), costs)

    after = _after(session, costs)
    left = 3600 * hours - after
    if seconds(1) > left:
        unit = "step" if in_steps else "epoch of every round"
        after_name = "merging" if options.merges else "measuring every network"
        raise TrainingError(
            f"total_hours={hours} is too little: {after_name} takes up to {after / 3600:.2g} hours and one {unit} "
            f"{seconds(1) / 3600:.2g}; write total_hours={_rounded_up((after + seconds(1)) / 3600)} or more"
        )
    longest = _largest(seconds, left)
    return RunLength(total_steps=longest) if in_steps else RunLength(longest)


def _largest(seconds: Callable[[int], float], left: float) -> int:
    """The largest number from 1 up that takes no longer than is left.

    Searched bit by bit, from a power of two above the estimate down. Dividing would not do: finishing is rounded, and a
    cycle of steps has dense and sparse ones, so seconds() is not proportional.
    """
    found, step = 1, max(1, 1 << math.floor(left / seconds(1)).bit_length())
    while step:
        if seconds(found + step) <= left:
            found += step
        step //= 2
    return found


def _rounded_up(hours: float) -> float:
    """With two significant digits, and not less."""
    unit = 10.0 ** (math.floor(math.log10(hours)) - 1)
    return float(f"{math.ceil(hours / unit) * unit:.2g}")


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

    with dry_run(session):
        with saved_tensors_hooks(keep, lambda tensor: tensor):
            step(names[0])()
        dense = _seconds(step(DENSE), session.device)
        sparse = mean(_seconds(step(name), session.device) for name in names)
        memory = _memory(session, optimization, activations)
        candidate = measuring = 0.0
        if session.shares is not None:
            alone = _seconds(lambda: held_out_losses(session, (names[0],)), session.device)
            measuring = alone * len(session.shares.shares)
        if session.data.held_out is not None:
            candidate = _seconds(lambda: score(session, names[-1]), session.device)
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
