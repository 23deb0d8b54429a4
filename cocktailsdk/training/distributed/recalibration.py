"""Batch-norm statistics of a network, measured by several processes together."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ...net.subnet_model import SubnetModel
from ...patterns.base import DENSE
from ...utils.batchnorm import frozen_norms, running_norms
from .ranks import Ranks
from .sharing import Part

__all__ = ["recalibrate"]


def recalibrate(
    net: SubnetModel,
    name: str,
    batches: Iterable[Any],
    forward: Callable[[nn.Module, Any], Any],
    ranks: Ranks,
    *,
    together: bool = False,
) -> None:
    """As :meth:`~cocktailsdk.CocktailNet.recalibrate`, each process on its parts of the batches.

    The statistics are the average over all parts, the same bits in every process. A part weighs as every other; its
    variance is that of its own examples, as in training where batch norms are not synchronised.

    Args:
        net: The networks.
        name: The network, or ``"dense"``.
        batches: This process's, as many as every other's.
        forward: How a batch is used.
        ranks: The processes.
        together: Whether a pass needs all processes (weights are sharded), so that none may leave one out.
    """
    if ranks.world == 1:
        net.recalibrate(name, batches, forward)
        return
    mine = list(batches)
    counted = [b for b in mine if together or not isinstance(b, Part) or b.count]
    frozen = frozen_norms(net.model)
    net.recalibrate(name, counted or mine, forward)
    # averaging frozen ones over processes would round them
    statistics = {key: t for key, t in net.statistics[name].items() if key.rpartition(".")[0] not in frozen}
    if not statistics:
        return
    _average(list(statistics.values()), len(counted), ranks)
    if name == DENSE:
        tensors = dict(net.model.named_buffers())
        for key, value in statistics.items():
            tensors[key].copy_(value)
        for path, norm in running_norms(net.model).items():
            if path not in frozen and norm.num_batches_tracked is not None:
                norm.num_batches_tracked.fill_(len(mine))


def _average(tensors: list[Tensor], weight: int, ranks: Ranks) -> None:
    """Weighted averages over processes, in place."""
    flat = torch.cat([tensor.reshape(-1).float() * weight for tensor in tensors])
    total = ranks.sum(torch.cat([flat, flat.new_tensor([float(weight)])]))
    for tensor, part in zip(tensors, (total[:-1] / total[-1]).split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(part.reshape(tensor.shape))
