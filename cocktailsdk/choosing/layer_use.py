"""What the hardware uses of a subnetwork's sparsity, layer by layer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from ..net.subnet_model import SubnetModel

__all__ = ["GONE", "KERNEL", "NOTHING", "SLIM", "WHOLE", "LayerUse", "layers_used", "use_counts"]

SLIM, KERNEL, GONE, NOTHING, WHOLE = "slim layer", "2:4 kernel", "layer gone", "nothing", "whole"
"""What can be used: fewer channels, a sparse kernel, nothing left to run; zeros that are multiplied as any other
number; and weights that the subnetwork leaves as they are."""


@dataclass(frozen=True)
class LayerUse:
    """One layer of a subnetwork as it is run.

    Attributes:
        weight: The weight's name.
        used: One of ``"slim layer"``, ``"2:4 kernel"``, ``"layer gone"``, ``"nothing"``, ``"whole"``.
        shape_dense: The weight's shape in the dense network.
        shape: Its shape as it is run; empty where it is gone.
        zeros: Share of zeros among the elements that are run.
        macs_dense: Multiply-adds of the dense layer on the example inputs.
        macs: Those that are run, zeros included.
    """

    weight: str
    used: str
    shape_dense: tuple[int, ...]
    shape: tuple[int, ...]
    zeros: float
    macs_dense: int
    macs: int


def layers_used(net: SubnetModel, name: str, model: nn.Module | None = None) -> list[LayerUse]:
    """For every weight of a subnetwork what its sparsity is good for in the model that is run.

    Args:
        net: The net.
        name: The subnetwork.
        model: What is run: by default ``net.slim(name)``; or that model with 2:4 kernels.

    Raises:
        SubnetError: There is no such subnetwork.
        SlimError: It cannot be slimmed.
    """
    name = net.subnet(name).name
    run = dict((model if model is not None else net.slim(name)).named_parameters(remove_duplicate=False))
    out = []
    for w in net.coupling.weights:
        parameter = run.get(w.name)
        if parameter is None:
            out.append(LayerUse(w.name, GONE, tuple(w.shape), (), 0.0, w.macs, 0))
            continue
        shape = tuple(parameter.shape)
        kernel = type(parameter).__name__.startswith("SparseSemiStructured")
        zeros = 0.5 if kernel else float((parameter.detach() == 0).float().mean()) if parameter.numel() else 0.0
        used = KERNEL if kernel else SLIM if shape != tuple(w.shape) else NOTHING if zeros else WHOLE
        macs = w.macs * parameter.numel() // max(w.numel, 1) // (2 if kernel else 1)
        out.append(LayerUse(w.name, used, tuple(w.shape), shape, zeros, w.macs, macs))
    return out


def use_counts(layers: Iterable[LayerUse]) -> dict[str, int]:
    """How many layers use what."""
    counts = dict.fromkeys((SLIM, KERNEL, GONE, NOTHING, WHOLE), 0)
    for layer in layers:
        counts[layer.used] += 1
    return {used: n for used, n in counts.items() if n}
