"""The loss of a forward pass, found from what the user gives or from what the model returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..errors import TrainingError

__all__ = ["ForwardFn", "LossFn", "loss_of"]

ForwardFn = Callable[[nn.Module, Any], tuple[Any, Any]]
LossFn = Callable[[Any, Any], Tensor]


def loss_of(output: Any, target: Any, loss_fn: LossFn | None, name: str = "loss_fn") -> Float[Tensor, ""]:
    """The training loss of an output.

    Args:
        output: From the forward pass.
        target: From the forward pass.
        loss_fn: The user's ``loss_fn(output, target)``, a scalar or a mapping of scalars, which are added; ``None``
            takes the model's own: ``output.loss``, ``output["loss"]``, or the sum of an output that is a mapping of
            scalar losses.
        name: What the function is called in errors.

    Raises:
        TrainingError: Where there is no loss, or it is no scalar.
    """
    if loss_fn is not None:
        loss = loss_fn(output, target)
        if (added := _sum(loss)) is not None:
            return added
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            found = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise TrainingError(f"{name} must return a scalar tensor, got {found}; reduce it with .mean()")
        return loss.reshape(())
    own: Any = getattr(output, "loss", None)
    if own is None and isinstance(output, Mapping):
        own = output["loss"] if "loss" in output else _sum(output)
    if not isinstance(own, Tensor) or own.numel() != 1:
        raise TrainingError(
            f"the model's output ({type(output).__name__}) holds no scalar loss: give loss_fn(output, target), or "
            "batches from which the model computes its own loss"
        )
    return own.reshape(())


def _sum(losses: Any) -> Float[Tensor, ""] | None:
    """The sum of a mapping of scalar losses; ``None`` for anything else."""
    if not isinstance(losses, Mapping) or not losses:
        return None
    if not all(isinstance(loss, Tensor) and loss.numel() == 1 for loss in losses.values()):
        return None
    return torch.stack([loss.reshape(()) for loss in losses.values()]).sum()
