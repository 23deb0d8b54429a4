"""Hooks of the step engine: what a method does between steps, besides training subnetworks.

A recipe names its hooks (``Recipe(hooks=(MyHook(),))``). A schedule that is a :class:`StepHook` itself is a hook of the
steps that it chooses. :mod:`cocktailsdk.training.rivals` has AC/DC and AST, which are written with nothing else.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ...masks import Mask
from ...net.subnet_model import SubnetModel
from ...utils.fsdp import local, sharded
from ..recipes.steps import ScheduleContext, Step
from .nan_guard import StepSnapshot

__all__ = ["StepContext", "StepHook"]


class StepHook:
    """Called at fixed places of every optimizer step; each method does nothing unless it is overridden.

    The order within one step: :meth:`before_step`, then for every subnet that the step trains its passes and
    :meth:`after_backward`, then :meth:`before_update`, the optimizer, and :meth:`after_update`.

    Every run works on a copy of its own (``copy.deepcopy``), so attributes may hold what a hook keeps from step to
    step. What must survive a resume goes into :meth:`state_dict`. With several processes, each calls its own copy in
    the same order.
    """

    def on_round_start(self, context: ScheduleContext) -> None:
        """A round begins, its masks made and its optimizer new. Not called where a round is resumed."""

    def before_step(self, context: StepContext) -> None:
        """Before the first pass of a step. What is changed here stays, even if the step is skipped."""

    def after_backward(self, context: StepContext, subnet: str) -> None:
        """After a subnet's passes over all batches of the step, the dense weights back in place.

        The gradients of the weights that the subnet's mask covers are its own, not masked yet, summed over accumulated
        batches and averaged over processes. Afterwards they are masked by the subnet's mask as it is then, and those
        of the passes before are added. With ``mixed_precision="fp16"`` they are multiplied by the loss scale.
        """

    def before_update(self, context: StepContext) -> None:
        """All gradients are added, masked and unscaled; clipping and the optimizer come next."""

    def after_update(self, context: StepContext) -> None:
        """The optimizer has stepped. Not called for a skipped step (``on_nan="skip"``, an overflow in fp16)."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: tensors and plain values, by name."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned, its tensors on the model's device."""


class StepContext:
    """One optimizer step, as its hooks see it.

    Masks that are set here are those of the main process, saved with the run, and put back if the step is skipped.

    Attributes:
        net: The model and its subnetworks; the dense network is active in every hook.
        step: What the schedule chose.
        schedule: What the schedule knew: the round, the step's number in it, the round's subnets.
        optimizer: The round's.
        undo: Takes in masks that are about to change, where the step may be skipped after its passes.
    """

    def __init__(
        self,
        net: SubnetModel,
        step: Step,
        schedule: ScheduleContext,
        optimizer: Optimizer,
        *,
        agreed: Callable[[Mapping[str, Mask]], Mapping[str, Mask]] = dict,
        changed: Callable[[str], None] = lambda name: None,
        snapshot: Callable[[str], None] = lambda name: None,
    ) -> None:
        self.net, self.step, self.schedule, self.optimizer = net, step, schedule, optimizer
        self._agreed, self._changed, self._snapshot = agreed, changed, snapshot
        self.undo: StepSnapshot | None = None
        self._parameters: dict[str, nn.Parameter] | None = None

    @property
    def subnets(self) -> tuple[str, ...]:
        """Names of the subnets that the step trains, without the dense network."""
        return self.step.subnets

    @property
    def sharded(self) -> bool:
        """Whether each process holds a part of the weights and gradients only (FSDP2)."""
        return sharded(self.net.model)

    @property
    def parameters(self) -> Mapping[str, nn.Parameter]:
        """The model's parameters by name, with their dense values."""
        if self._parameters is None:
            self._parameters = dict(self.net.model.named_parameters())
        return self._parameters

    @property
    def gradients(self) -> dict[str, Tensor]:
        """The parameters' gradients by name, without those that have none; change them in place."""
        return {name: p.grad for name, p in self.parameters.items() if p.grad is not None}

    def set_mask(self, name: str, mask: Mask) -> None:
        """Give a subnet another mask. Its running batch-norm statistics stay: training goes on adapting them.

        Raises:
            PatternError: The mask does not fit the model.
        """
        if self.undo is not None:
            self.undo.add_mask(name)
        statistics = self.net.statistics.get(name)
        self.net.set_mask(name, self._agreed({name: mask})[name])
        if statistics is not None:
            self.net.statistics[name] = statistics
        self._changed(name)

    def remake_masks(self, names: Iterable[str]) -> None:
        """Make subnets' masks anew by their patterns, each from the weights as they are now."""
        for name in names:
            self.set_mask(name, self.net.make_masks(name))

    @torch.no_grad()
    def zero_masked_weights(self, name: str) -> None:
        """Set the dense weights that a subnet masks to 0."""
        for key, mask in self.net.mask_tensors(name).items():
            local(self.parameters[key]).mul_(mask)

    def drop_optimizer_state(self) -> None:
        """Drop momentum and whatever else the optimizer keeps of the parameters."""
        self.optimizer.state.clear()

    def snapshot_weights(self, name: str) -> None:
        """Store the weights as they are now as those that a network ends with; ``"dense"`` is one too.

        The recipe says so, too: ``Recipe(weights="own")``.

        Raises:
            TrainingError: Some weights are not finite.
        """
        self._snapshot(name)


@dataclass(frozen=True)
class HookCalls:
    """The hooks of one step, to be called by the name of a method and its arguments after the context."""

    hooks: Sequence[StepHook]
    context: StepContext

    def __call__(self, method: str, *arguments: Any) -> None:
        """Call a method of all hooks."""
        for hook in self.hooks:
            getattr(hook, method)(self.context, *arguments)


class StepHooks:
    """A run's own copies of a recipe's hooks.

    Args:
        schedule: The step schedule of the rounds.
        finishing_schedule: That of finishing.
        hooks: Those that the recipe names.
    """

    def __init__(self, schedule: Any, finishing_schedule: Any, hooks: Sequence[StepHook]) -> None:
        self._schedules = [
            copy.deepcopy(s) if isinstance(s, StepHook) else None for s in (schedule, finishing_schedule)
        ]
        self._others = tuple(copy.deepcopy(hook) for hook in hooks)

    @property
    def _all(self) -> list[StepHook]:
        return [*filter(None, self._schedules), *self._others]

    def of(self, context: ScheduleContext, last: int) -> tuple[StepHook, ...]:
        """The hooks of a step: for a dense round no schedule is called, so none is among them.

        Args:
            context: Where the run stands.
            last: Number of the last round before finishing.
        """
        own = self._schedules[context.round > last] if any(context.subnets.values()) else None
        return self._others if own is None else (own, *self._others)

    def state_dict(self) -> list[dict[str, Any]]:
        """The states of all."""
        return [hook.state_dict() for hook in self._all]

    def load_state_dict(self, states: Sequence[Mapping[str, Any]]) -> None:
        """The inverse of :meth:`state_dict`."""
        for hook, state in zip(self._all, states, strict=True):
            hook.load_state_dict(state)

    def __len__(self) -> int:
        return len(self._all)
