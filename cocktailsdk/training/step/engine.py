"""The step engine: how one subnetwork's pass is made. ``Stepper`` and ``CoLoop`` both run their passes through it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from ...net.subnet_model import SubnetModel
from ...net.write_policy import Changes
from ...patterns.base import DENSE
from ...utils.batchnorm import statistics_of
from .distill import Distillation
from .execution import Execution
from .forward import LossFn

__all__ = ["ActivePass", "StepEngine"]


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
        """Whether a pass learns from the dense network's output."""
        return subnet != DENSE and bool(self.distillation.weight)

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
        teacher: The dense network's output for the batch; ``None`` where nothing is distilled.
    """

    engine: StepEngine
    subnet: str
    teacher: Any

    def loss(
        self, loss: Float[Tensor, ""], output: Any, target: Any, loss_fn: LossFn | None = None
    ) -> Float[Tensor, ""]:
        """What backward is called on: the loss from the labels, with distillation for subnets."""
        if self.subnet == DENSE:
            return loss
        return self.engine.distillation(loss, output, self.teacher, target, loss_fn)
