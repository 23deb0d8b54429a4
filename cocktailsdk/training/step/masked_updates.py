"""Recipes with ``update="active"``: momentum and weight decay leave masked weights alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ...net.subnet_model import SubnetModel
from ...utils.fsdp import local

__all__ = ["masked_weights_unchanged"]


@contextmanager
def masked_weights_unchanged(
    net: SubnetModel, subnets: Sequence[str], parameters: Mapping[str, nn.Parameter], optimizer: Optimizer
) -> Iterator[None]:
    """Let the optimizer step inside; weights that all subnets mask, and its state of them, are then as they were.

    Restored afterwards, since optimizers differ in what moves a weight whose gradient is 0 (momentum, decay, moments).

    Args:
        net: The networks.
        subnets: Those that the step trained. The dense network masks nothing.
        parameters: The model's, by name.
        optimizer: Its state of the shape of a parameter is restored with it.
    """
    before: list[tuple[Tensor, Tensor, Tensor]] = []
    for name, mask in _union(net, subnets).items():
        if name not in parameters:
            continue
        parameter = parameters[name]
        state = [v for v in optimizer.state.get(parameter, {}).values() if isinstance(v, Tensor)]
        alike = [local(parameter.detach()), *(local(v) for v in state if v.shape == parameter.shape)]
        before += [(tensor, tensor.clone(), mask) for tensor in alike]
    yield
    for tensor, old, mask in before:
        tensor.copy_(torch.where(mask.bool(), tensor, old))


def _union(net: SubnetModel, subnets: Sequence[str]) -> dict[str, Tensor]:
    """The masks of the weights that at least one of the subnets trains, where all of them mask some."""
    first, *others = [net.mask_tensors(name) for name in subnets]
    out = {name: mask for name, mask in first.items() if all(name in masks for masks in others)}
    for masks in others:
        out = {name: torch.maximum(mask, masks[name]) for name, mask in out.items()}
    return out
