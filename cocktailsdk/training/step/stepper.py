"""One optimizer step: of the dense network, of a sparse one, or of several whose gradients are added."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.optim import Optimizer

from ...errors import TrainingError
from ...net.subnet_model import SubnetModel
from ...patterns.base import DENSE
from ...utils.batchnorm import statistics_of
from ...utils.blame import one_line
from ...utils.fsdp import local
from ..distributed.sharing import inputs_of
from ..options import Options
from ..recipes import Step, Turn
from ..rivals.regrowth import correct_gradients, regrown
from .distill import Classes, Distillation, DistillFn
from .execution import Execution
from .forward import ForwardFn, LossFn, detached, loss_of
from .resolution import resized

__all__ = ["Stepper", "Trained"]


@dataclass(frozen=True)
class Trained:
    """What came of a step.

    Attributes:
        losses: By network, detached.
        teacher: What the dense network said in its turn to each batch, where the step leads another or has turns
            after it.
        remade: Subnets whose masks it changed.
        skipped: Whether gradients were too large for half precision, so that the weights stayed as they were.
        left_out: Whether the optimizer did not step, as ``Stepper.allows`` said.
    """

    losses: Mapping[str, Float[Tensor, ""]]
    teacher: Any
    remade: frozenset[str] = frozenset()
    skipped: bool = False
    left_out: bool = False


class Stepper:
    """Trains the networks that share the weights, a step at a time.

    Args:
        net: The networks.
        forward: How a batch is used.
        loss_fn: The user's loss, or ``None`` for the model's own.
        distill_fn: ``distill_fn(student_output, teacher_output)``, or ``None`` for soft cross-entropy.
        distill_weight: Its share in the loss of a sparse turn; at 0 there is no teacher.
        classes: Where the output holds class logits, if it does.
        active: Whether masked weights are left alone by momentum and weight decay too.
        separate: Whether every network keeps running statistics of its own.
        previous: Gradients of the step before, by name, for steps that correct theirs; kept up to date.
        execution: How passes run; by default in this process alone.

    Attributes:
        allows: Given a step's losses, its gradients in place, and whether they are scaled: says whether the optimizer
            steps; by default always.
    """

    def __init__(
        self,
        net: SubnetModel,
        forward: ForwardFn,
        loss_fn: LossFn | None,
        distill_fn: DistillFn | None,
        distill_weight: float,
        classes: Classes | None,
        *,
        active: bool = False,
        separate: bool = False,
        previous: MutableMapping[str, Tensor] | None = None,
        execution: Execution | None = None,
    ) -> None:
        self._net = net
        self._execution = execution or Execution(net.model, forward)
        self._loss_fn = loss_fn
        self._distilled = Distillation(distill_weight, distill_fn, classes)
        self._weight = distill_weight
        self._classes = classes
        self._active, self._separate = active, separate
        self._previous = {} if previous is None else previous
        self._parameters = dict(net.model.named_parameters())
        self.allows: Callable[[Mapping[str, Tensor], bool], bool] | None = None

    @classmethod
    def of(
        cls,
        net: SubnetModel,
        options: Options,
        classes: Classes | None,
        previous: MutableMapping[str, Tensor] | None = None,
        execution: Execution | None = None,
    ) -> Stepper:
        """The stepper that a run asks for."""
        return cls(
            net,
            options.forward_fn,
            options.loss_fn,
            options.distill_fn,
            options.distillation,
            classes,
            active=options.recipe.update == "active",
            separate=options.recipe.statistics == "separate",
            previous=previous,
            execution=execution,
        )

    def step(
        self,
        step: Step,
        batches: Sequence[Any],
        optimizer: Optimizer,
        teacher: Sequence[Any] | None = None,
        scaler: torch.amp.GradScaler | None = None,
    ) -> Trained:
        """Train one network on a batch or some, or several networks whose gradients are added.

        A sparse network's gradients reach only the weights it keeps. Momentum and weight decay go on moving the
        others, as published, unless the stepper is ``active``.

        Args:
            step: What to do. The dense network must be active, and is so again afterwards.
            batches: On the model's device; gradients are those of the mean loss over all their examples.
            optimizer: Steps once.
            teacher: What the dense network said to each batch, where it is known already.
            scaler: Scales losses, for half precision.
        """
        execution = self._execution
        if execution.sharded and (step.regrow or step.correct):
            raise TrainingError("sharded weights (FSDP2) cannot regrow masks or correct gradients: train with DDP")
        optimizer.zero_grad(set_to_none=True)
        shares = execution.shares(batches, self._classes)
        batches = [inputs_of(batch) for batch in batches]
        losses: dict[str, Tensor] = {}
        for i, turn in enumerate(step.turns):
            said: list[Any] = []
            sparse = turn.network != DENSE
            with self._added(turn.network, step.regrow) if sparse else nullcontext():
                for j, (batch, share) in enumerate(zip(batches, shares, strict=True)):
                    known = None if teacher is None else teacher[j]
                    if sparse and self._weight and known is None:
                        known = execution.teacher(batch)
                    with execution.collecting(j + 1 == len(batches)), self._switched(turn.network):
                        loss, output = self._loss(turn, batch, known)
                        loss = execution.backward(loss, share, scaler)
                    losses[turn.network] = losses[turn.network] + loss if j else loss
                    if step.leads or i + 1 < len(step.turns):
                        said.append(known if sparse else detached(output))
            teacher = said if self._weight and said else teacher if sparse else None
        losses = execution.combined(losses)
        if self.allows is not None and execution.ranks.any(not self.allows(losses, scaler is not None)):
            return Trained(losses, teacher, left_out=True)
        if scaler is not None:
            scaler.unscale_(optimizer)
        if step.correct:
            correct_gradients(self._parameters, self._previous)
        execution.clip()
        with self._held(step.turns, optimizer):
            skipped = _stepped(optimizer, scaler)
        remade = frozenset(losses) - {DENSE} if step.regrow else frozenset()
        return Trained(losses, teacher, remade, skipped)

    @contextmanager
    def _switched(self, name: str) -> Iterator[None]:
        if name == DENSE:
            yield
            return
        with self._net.using(name, statistics=self._separate, changes="discard"):
            yield
            if self._separate:
                self._net.statistics[name] = statistics_of(self._net.model)

    def _loss(self, turn: Turn, batch: Any, teacher: Any) -> tuple[Float[Tensor, ""], Any]:
        if turn.network != DENSE:
            batch = resized(batch, turn.resolution)
        output, target = self._execution.student(batch)
        loss = loss_of(output, target, self._loss_fn)
        if turn.network != DENSE:
            loss = self._distilled(loss, output, teacher, target, self._loss_fn)
        return loss, output

    @contextmanager
    def _added(self, name: str, regrow: float) -> Iterator[None]:
        """Mask the gradients that come up inside, after regrowing by them, and add those that were there before."""
        masked = [key for key in self._net.masked_parameters(name) if key in self._parameters]
        before = {key: grad for key in masked if (grad := self._parameters[key].grad) is not None}
        for key in before:
            self._parameters[key].grad = None
        yield
        if regrow:
            own = self._net.statistics.get(name)
            self._net.set_mask(name, regrown(self._net, name, regrow))
            if own is not None:
                self._net.statistics[name] = own
        # unpacked only now, not beside the activations
        self._net.zero_masked(name, {key: p.grad for key, p in self._parameters.items() if p.grad is not None})
        for key, old in before.items():
            grad = self._parameters[key].grad
            self._parameters[key].grad = old if grad is None else grad.add_(old)

    @contextmanager
    def _held(self, turns: Sequence[Turn], optimizer: Optimizer) -> Iterator[None]:
        """Leave weights that every turn masks, and what the optimizer keeps of them, as they are."""
        masks = self._masked_by_all(turns) if self._active else {}
        before: list[tuple[Tensor, Tensor, Tensor]] = []
        for name, mask in masks.items():
            parameter = self._parameters[name]
            mine = [v for v in optimizer.state.get(parameter, {}).values() if isinstance(v, Tensor)]
            alike = [local(parameter.detach()), *(local(v) for v in mine if v.shape == parameter.shape)]
            before += [(tensor, tensor.clone(), mask) for tensor in alike]
        yield
        for tensor, old, mask in before:
            tensor.copy_(torch.where(mask.bool(), tensor, old))

    def _masked_by_all(self, turns: Sequence[Turn]) -> dict[str, Tensor]:
        all_masks = [{} if t.network == DENSE else self._net.mask_tensors(t.network) for t in turns]
        shared = [n for n in all_masks[0] if n in self._parameters and all(n in masks for masks in all_masks)]
        out = {}
        for name in shared:
            mask = all_masks[0][name]
            for other in all_masks[1:]:
                mask = torch.maximum(mask, other[name])
            out[name] = mask
        return out


def _stepped(optimizer: Optimizer, scaler: torch.amp.GradScaler | None) -> bool:
    """Step; whether the scaler left the step out."""
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
    return scaler.get_scale() < before
