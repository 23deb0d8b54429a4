"""Hooks of the step engine: they change masks, gradients, weights and the optimizer between steps.

A recipe names its hooks (``Recipe(hooks=(MyHook(),))``). If its schedule is a :class:`StepHook` too, the schedule's
methods are called in the steps that it chooses. AC/DC and AST in :mod:`cocktailsdk.training.rivals` are written this
way.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ...errors import TrainingError
from ...masks import Mask
from ...net.subnet_model import SubnetModel
from ...patterns.base import DENSE
from ...patterns.scoring import PatternScores
from ...utils.fsdp import local, sharded
from ..recipes.steps import ScheduleContext, Step
from .nan_guard import StepSnapshot

__all__ = ["StepContext", "StepHook"]


class StepHook:
    """Base class of hooks. Every optimizer step calls these methods; override those that you need.

    One step calls :meth:`before_step`. Then it trains each subnet and calls :meth:`after_backward` for it. Then it
    calls :meth:`before_update`, steps the optimizer, and calls :meth:`after_update`.

    Every run works on its own copy of the hook (``copy.deepcopy``), so a hook may keep values in attributes from step
    to step. Return those that a resumed run needs from :meth:`state_dict`. With several processes, each process calls
    its own copy, in the same order.
    """

    def on_round_start(self, context: ScheduleContext) -> None:
        """A round begins: its masks are made and its optimizer is new. Not called when a round is resumed."""

    def before_step(self, context: StepContext) -> None:
        """Before the first pass of a step. Changes made here stay, even if the step is skipped."""

    def after_backward(self, context: StepContext, subnet: str) -> None:
        """After a subnet's passes over all batches of the step. The dense weights are back in place.

        Parameters that have a mask in this subnet hold this subnet's gradients alone, summed over accumulated batches
        and averaged over processes. They are not masked yet. When this method returns, they are masked by the subnet's
        mask as it is then, and the gradients of the step's earlier subnets are added. With ``mixed_precision="fp16"``
        they are multiplied by the loss scale.
        """

    def before_update(self, context: StepContext) -> None:
        """After gradients are masked, added and unscaled; before they are clipped and the optimizer steps."""

    def after_update(self, context: StepContext) -> None:
        """After the optimizer has stepped. Not called for a skipped step (``on_nan="skip"``, an overflow in fp16)."""

    def state_dict(self) -> dict[str, Any]:
        """The values that a resumed run needs: tensors and plain values, by name."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the values that :meth:`state_dict` returned. Tensors are on the model's device."""


class StepContext:
    """One optimizer step, as its hooks see it.

    Change masks by its methods. All processes then get the mask of the main process, and the run saves it. A mask that
    was set after the step's passes began is put back if the step is skipped.

    Attributes:
        net: The model and its subnetworks. The dense network is active in every hook.
        step: The step that the schedule chose.
        schedule: The context that the schedule got: the round, the number of the step in it, the round's subnets.
        optimizer: The optimizer of the round.
        undo: Records masks before they change, so that a skipped step can put them back. ``None`` if no step can be
            skipped, and in ``before_step``.
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
        calibrate: Callable[[], PatternScores | None] = lambda: None,
    ) -> None:
        self.net, self.step, self.schedule, self.optimizer = net, step, schedule, optimizer
        self._agreed, self._changed, self._snapshot, self._calibrate = agreed, changed, snapshot, calibrate
        self.undo: StepSnapshot | None = None
        self._parameters: dict[str, nn.Parameter] | None = None

    @property
    def subnets(self) -> tuple[str, ...]:
        """Names of the subnets that the step trains, without the dense network."""
        return self.step.subnets

    @property
    def sharded(self) -> bool:
        """Whether each process holds only a part of the weights and gradients (FSDP2)."""
        return sharded(self.net.model)

    @property
    def parameters(self) -> Mapping[str, nn.Parameter]:
        """The model's parameters by name, with their dense values."""
        if self._parameters is None:
            self._parameters = dict(self.net.model.named_parameters())
        return self._parameters

    @property
    def gradients(self) -> dict[str, Tensor]:
        """Gradients by parameter name, without parameters that have none. Change them in place."""
        return {name: p.grad for name, p in self.parameters.items() if p.grad is not None}

    def set_mask(self, name: str, mask: Mask) -> None:
        """Give a subnet another mask. Its batch-norm statistics stay, because training continues to adapt them.

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
        """Make the masks of subnets anew from the current weights, each by its pattern and the run's score."""
        scores = self._calibrate()
        for name in names:
            self.set_mask(name, self.net.make_masks(name, scores=scores))

    @torch.no_grad()
    def zero_masked_weights(self, name: str) -> None:
        """Set the dense weights that a subnet masks to 0."""
        for key, mask in self.net.mask_tensors(name).items():
            local(self.parameters[key]).mul_(mask)

    def drop_optimizer_state(self) -> None:
        """Drop momentum and all other state that the optimizer keeps for the parameters."""
        self.optimizer.state.clear()

    def snapshot_weights(self, name: str) -> None:
        """Store the current weights as the final weights of one network; ``"dense"`` is one too.

        The recipe must have ``weights="own"``.

        Raises:
            TrainingError: Some weights are not finite, or the recipe has ``weights="shared"``.
            SubnetError: There is no such network.
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
            if (active := self.context.net.active) != DENSE:  # the next pass would train masked weights as dense ones
                self.context.net.switch(DENSE)
                raise TrainingError(
                    f"{type(hook).__name__}.{method}() left {active!r} active, and training would continue in it: use "
                    f"it within `with context.net.using({active!r}):`"
                )


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
