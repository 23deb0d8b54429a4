"""The step engine: one subnetwork's pass, which ``CoLoop`` runs too, and one optimizer step of one or more passes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.optim import Optimizer

from ...errors import TrainingError
from ...net.subnet_model import SubnetModel
from ...net.write_policy import Changes
from ...patterns.base import DENSE
from ...utils.batchnorm import statistics_of
from ...utils.blame import one_line
from ...utils.fsdp import local
from ...utils.losses import LossFn, loss_of
from ..distributed.sharing import inputs_of
from ..options import Options
from ..recipes.steps import Step, SubnetPass
from .distill import Classes, Distillation
from .execution import Execution
from .forward import detached, resized

__all__ = ["ActivePass", "StepEngine", "StepResult", "Stepper"]


class StepEngine:
    """Makes the passes of a step on the shared weights.

    For a sparse pass this is, in order:

    1. the dense network's output for the batch, unless it is known (the dense weights are still in place);
    2. :meth:`active` puts the subnet's weights in place;
    3. inside, the caller runs the forward pass, :meth:`ActivePass.loss` adds distillation, the caller runs backward;
    4. on leaving, the dense weights are back;
    5. :meth:`mask_gradients` sets the gradients of masked weights to 0.

    Backward runs before 4, since autograd reads the weights that the forward pass used. Gradients are masked after 4
    and not by hooks of autograd: hooks of tensors would run before DDP has averaged, and would hide from
    ``StepHook.after_backward`` the gradients of masked weights.

    Args:
        net: The model and its subnetworks.
        execution: How passes run.
        distillation: What subnets learn from the dense network.
        separate: Whether every network keeps its own running statistics. They are not swapped otherwise: batch norms in
            train mode normalise by the batch, so that no gradient depends on them, and copying them takes time.
        changes: What to do with weights that were changed while a subnet was active (see ``net.using``).

    Attributes:
        distillation: As given; may be replaced between passes.
        parameters: The model's, by name.
    """

    def __init__(
        self,
        net: SubnetModel,
        execution: Execution,
        distillation: Distillation,
        *,
        separate: bool = False,
        changes: Changes = "refuse",
    ) -> None:
        self._net, self._execution = net, execution
        self._separate, self._changes = separate, changes
        self.distillation = distillation
        self.parameters = dict(net.model.named_parameters())

    def needs_teacher(self, subnet: str) -> bool:
        """Whether a pass learns from a teacher's output. The dense network has a teacher only if that is frozen."""
        return bool(self.distillation.weight) and (subnet != DENSE or self._execution.frozen is not None)

    @contextmanager
    def active(self, subnet: str, batch: Any = None, teacher: Any = None) -> Iterator[ActivePass]:
        """One network's pass over one batch: forward and backward run inside.

        Args:
            subnet: Which network.
            batch: For the teacher's pass, where one is needed.
            teacher: The dense network's output for the batch, where it is known.
        """
        if self.needs_teacher(subnet) and teacher is None:
            teacher = self._execution.teacher(batch)
        active = ActivePass(self, subnet, teacher)
        if subnet == DENSE:
            yield active
            return
        with self._net.using(subnet, statistics=self._separate, changes=self._changes):
            yield active
            if self._separate:  # read while they are in the model's buffers
                self._net.statistics[subnet] = statistics_of(self._net.model)

    @contextmanager
    def masked_gradients(self, subnet: str, after_backward: Callable[[], None]) -> Iterator[None]:
        """Mask the gradients of the passes inside, then add those of the passes before. Nothing for the dense network.

        Args:
            subnet: Which network.
            after_backward: Called before the gradients are masked.
        """
        if subnet == DENSE:
            yield
            return
        parameters = self.parameters
        masked = [parameters[name] for name in self._net.masked_parameters(subnet) if name in parameters]
        # Set aside, or the mask of this subnet would cut the gradients of the passes before.
        before = [(p, p.grad) for p in masked if p.grad is not None]
        for parameter, _ in before:
            parameter.grad = None
        yield
        after_backward()
        self.mask_gradients(subnet)
        for parameter, old in before:
            parameter.grad = old if parameter.grad is None else parameter.grad.add_(old)

    def mask_gradients(self, subnet: str) -> bool:
        """Set the gradients of the weights that a subnet masks to 0.

        Masks are unpacked to the size of the weights here, once activations are freed, and not during the pass: that
        keeps the peak of memory at the pass itself.

        Returns:
            Whether there were any gradients.
        """
        gradients = {name: p.grad for name, p in self.parameters.items() if p.grad is not None}
        self._net.zero_masked(subnet, gradients)
        return bool(gradients)


@dataclass(frozen=True)
class ActivePass:
    """A pass between its switches.

    Attributes:
        engine: Which made it.
        subnet: Which network is active.
        teacher: The teacher's output for the batch; ``None`` where nothing is distilled.
    """

    engine: StepEngine
    subnet: str
    teacher: Any

    def loss(
        self, loss: Float[Tensor, ""], output: Any, target: Any, loss_fn: LossFn | None = None
    ) -> Float[Tensor, ""]:
        """What backward is called on: the loss from the labels, with distillation if the pass has a teacher."""
        if not self.engine.needs_teacher(self.subnet):
            return loss
        return self.engine.distillation(loss, output, self.teacher, target, loss_fn)


@dataclass(frozen=True)
class StepResult:
    """The outcome of a step.

    Attributes:
        losses: By network, detached.
        teacher: The dense network's output for each batch, where it was to be kept.
        overflowed: Whether gradients overflowed in half precision, so that the weights stayed as they were.
        rejected: Whether ``Stepper.allows`` refused the step, so that the optimizer did not step.
    """

    losses: Mapping[str, Float[Tensor, ""]]
    teacher: Sequence[Any] | None = None
    overflowed: bool = False
    rejected: bool = False

    @property
    def made(self) -> bool:
        """Whether the optimizer stepped."""
        return not (self.overflowed or self.rejected)


class Stepper:
    """Trains the networks that share the weights, a step at a time: passes, backward and the optimizer.

    Args:
        net: The networks.
        execution: How passes run.
        loss_fn: The user's loss, or ``None`` for the model's own.
        distillation: What sparse networks learn from the dense one.
        active: Whether masked weights are left alone by momentum and weight decay too.
        separate: Whether every network keeps running statistics of its own.

    Attributes:
        allows: Given a step's losses, its gradients in place, and whether they are scaled: says whether the optimizer
            steps; by default always.
    """

    def __init__(
        self,
        net: SubnetModel,
        execution: Execution,
        loss_fn: LossFn | None,
        distillation: Distillation,
        *,
        active: bool = False,
        separate: bool = False,
    ) -> None:
        self._net, self._execution = net, execution
        # "discard": weights are the engine's while a subnet is active, so that nobody's changes are looked for
        self._engine = StepEngine(net, execution, distillation, separate=separate, changes="discard")
        self._loss_fn, self._active = loss_fn, active
        self.allows: Callable[[Mapping[str, Tensor], bool], bool] | None = None

    @classmethod
    def of(cls, net: SubnetModel, execution: Execution, options: Options, classes: Classes | None) -> Stepper:
        """The stepper that a run asks for."""
        given = options.settings.distillation
        distillation = Distillation(options.distillation, given.loss_fn, classes, options.temperature)
        active, separate = options.recipe.update == "active", options.recipe.statistics == "separate"
        return cls(net, execution, options.loss_fn, distillation, active=active, separate=separate)

    def step(
        self,
        step: Step,
        batches: Sequence[Any],
        optimizer: Optimizer,
        teacher: Sequence[Any] | None = None,
        scaler: torch.amp.GradScaler | None = None,
        *,
        keep_teacher: bool = False,
        hooks: Callable[..., None] = lambda method, *arguments: None,
    ) -> StepResult:
        """Train one network on a batch or several, or several networks whose gradients are added.

        A sparse network's gradients reach only the weights that its mask keeps. Momentum and weight decay go on moving
        the others, as published, unless the stepper is ``active``.

        Args:
            step: What to do. The dense network must be active, and is so again afterwards.
            batches: On the model's device; gradients are those of the mean loss over all their examples.
            optimizer: Steps once.
            teacher: The dense network's output for each batch, where it is known.
            scaler: Scales losses, for half precision.
            keep_teacher: Whether the result has the dense network's output for each batch.
            hooks: Calls the step's hooks, by the name of a method.
        """
        execution = self._execution
        # First: whatever ran between two steps (callbacks, hooks) leaves no gradients in this one. As None, gradients
        # take no memory during the first forward pass.
        optimizer.zero_grad(set_to_none=True)
        shares = execution.shares(batches, self._engine.distillation.classes)
        parts = [(inputs_of(batch), share) for batch, share in zip(batches, shares, strict=True)]
        losses: dict[str, Tensor] = {}
        for i, one in enumerate(step.passes):
            keep = keep_teacher or i + 1 < len(step.passes)
            losses[one.subnet], teacher = self._pass(one, parts, teacher, scaler, hooks, keep)
        teacher = teacher if keep_teacher else None
        losses = execution.combined(losses)
        # all processes decide alike, or the next collective operation would wait for ever
        if self.allows is not None and execution.ranks.any(not self.allows(losses, scaler is not None)):
            return StepResult(losses, teacher, rejected=True)
        if scaler is not None:
            scaler.unscale_(optimizer)  # before all that looks at the size of gradients
        hooks("before_update")
        execution.clip()
        with self._masked_unchanged(step, optimizer):
            overflowed = _update(optimizer, scaler)
        if not overflowed:
            hooks("after_update")
        return StepResult(losses, teacher, overflowed)

    @torch.no_grad()
    def loss(self, subnet: str, batch: Any) -> Float[Tensor, ""]:
        """A network's loss on a batch, as a pass of a step computes it, without backward.

        Args:
            subnet: Which network; the dense one must be active.
            batch: On the model's device.
        """
        engine = self._engine
        with engine.active(subnet, inputs_of(batch)) as active:
            output, target = self._execution.student(inputs_of(batch))
            return active.loss(loss_of(output, target, self._loss_fn), output, target, self._loss_fn)

    def _pass(
        self,
        one: SubnetPass,
        parts: Sequence[tuple[Any, Tensor | None]],
        teacher: Sequence[Any] | None,
        scaler: torch.amp.GradScaler | None,
        hooks: Callable[..., None],
        keep_teacher: bool,
    ) -> tuple[Tensor, Sequence[Any] | None]:
        """One network's pass over all batches of the step: its loss, and the dense outputs for the passes after it."""
        execution, engine = self._execution, self._engine
        losses: list[Tensor] = []
        outputs: list[Any] = []
        with engine.masked_gradients(one.subnet, partial(hooks, "after_backward", one.subnet)):
            for i, (batch, share) in enumerate(parts):
                known = None if teacher is None else teacher[i]
                last = i + 1 == len(parts)
                with execution.collecting(last), engine.active(one.subnet, batch, known) as active:
                    resolution = 1.0 if one.subnet == DENSE else one.resolution
                    output, target = execution.student(resized(batch, resolution))
                    loss = active.loss(loss_of(output, target, self._loss_fn), output, target, self._loss_fn)
                    losses.append(execution.backward(loss, share, scaler))
                if keep_teacher and engine.distillation.weight:
                    # the dense network's output teaches the passes after it, unless the teacher is frozen
                    taught = engine.needs_teacher(one.subnet)
                    outputs.append(active.teacher if taught else detached(output))
        # an output of the dense network is of this step's batches: whatever taught before the dense pass is not needed
        known_after = outputs or (None if one.subnet == DENSE else teacher)
        return sum(losses[1:], losses[0]), known_after

    @contextmanager
    def _masked_unchanged(self, step: Step, optimizer: Optimizer) -> Iterator[None]:
        """Let the optimizer step inside; if active, what all subnets mask, and the state of it, is then as it was.

        Restored afterwards, since optimizers differ in what moves a weight whose gradient is 0 (momentum, decay,
        moments). The dense network masks nothing.
        """
        before: list[tuple[Tensor, Tensor, Tensor]] = []
        if self._active and all(one.subnet != DENSE for one in step.passes):
            for name, mask in _union(self._net, step.subnets).items():
                if (parameter := self._engine.parameters.get(name)) is None:
                    continue
                state = [v for v in optimizer.state.get(parameter, {}).values() if isinstance(v, Tensor)]
                alike = [local(parameter.detach()), *(local(v) for v in state if v.shape == parameter.shape)]
                before += [(tensor, tensor.clone(), mask) for tensor in alike]
        yield
        for tensor, old, mask in before:
            tensor.copy_(torch.where(mask.bool(), tensor, old))


def _update(optimizer: Optimizer, scaler: torch.amp.GradScaler | None) -> bool:
    """Step; whether the scaler skipped the step for gradients that overflowed."""
    if scaler is None:
        try:
            optimizer.step()
        except torch.OutOfMemoryError:
            raise
        except (TypeError, ValueError, AssertionError, RuntimeError) as error:
            # of those that want a closure although it has a default (SAM), or other gradients (SparseAdam)
            raise TrainingError(
                f"{type(optimizer).__name__}.step() raised {type(error).__name__} ({one_line(error)}): give an "
                "optimizer that steps without arguments and takes dense gradients, for example "
                "optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1)"
            ) from error
        return False
    scaler.step(optimizer)
    before = scaler.get_scale()
    scaler.update()
    # GradScaler (torch 2.11 to 2.14) does not say whether it skipped; only then does update() lower the scale
    return scaler.get_scale() < before


def _union(net: SubnetModel, subnets: Sequence[str]) -> dict[str, Tensor]:
    """The masks of the weights that at least one of the subnets trains, where all of them mask some."""
    every = [net.mask_tensors(name) for name in subnets]
    shared = [name for name in every[0] if all(name in masks for masks in every)]
    return {name: reduce(torch.maximum, [masks[name] for masks in every]) for name in shared}
