"""A net's subnetworks as plain models."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from ..errors import SlimError
from ..graph import Coupling, slim_module
from ..graph.copies import duplicate
from ..graph.hook_weights import refresh_hook_weights
from ..models import after_slim
from ..net.subnet_model import SubnetModel
from ..net.tracing import couple_model
from ..patterns import Layers
from ..patterns.whole_layers import dropped_layers, layers_of
from ..utils.devices import device_of
from ..utils.nested import to_device
from .depth import without_branches
from .experts import without_experts
from .layers import without_layers

__all__ = ["coupling_difference", "slim_subnet"]


def slim_subnet(net: SubnetModel, name: str) -> nn.Module:
    """A plain copy of a net's subnetwork, removed channels sliced away.

    Raises:
        SlimError: It cannot be made, or the model is coupled otherwise than its bundle says.
    """
    mask = net.masks.get(name)
    removed = None if mask is None else mask.removed
    experts = {} if mask is None else mask.experts
    if not experts and (removed is None or not bool(removed.any())):
        with net.using(name):
            made = duplicate(net.model)
            refresh_hook_weights(made.modules())
        dropped = mask.dropped(net.coupling) if mask is not None else ()
        if not dropped or net.example is None:
            return made
        args, kwargs = to_device(net.example, device_of(net.model))
        paths = _whole_layers(net, name)
        smaller = without_layers(made, paths, args, kwargs) if paths else None
        if smaller is None:
            without_branches(made, dropped, args, kwargs)
        return after_slim(made if smaller is None else smaller, (args, kwargs))
    if net.example is None:
        raise SlimError(
            "slimming traces the model, but the bundle could not describe its example inputs: set "
            "net.example = (args, kwargs)"
        )
    args, kwargs = to_device(net.example, device_of(net.model))
    if experts:
        with net.using(name):
            made = without_experts(net.model, net.coupling.experts, experts, args, kwargs)
        return after_slim(made, (args, kwargs))
    assert removed is not None
    coupling = traced_coupling(net)
    with net.using(name):
        made = slim_module(net.model, coupling, removed, args, kwargs)
    return after_slim(made, (args, kwargs))


def _whole_layers(net: SubnetModel, name: str) -> list[str]:
    """Paths of the layers that a subnetwork of the pattern ``layers`` drops."""
    if not isinstance(net.pattern(net.subnet(name).pattern), Layers):
        return []
    layers = layers_of(net.coupling)
    return [layer.path for layer in dropped_layers(net.masks[name], net.coupling, layers)]


def traced_coupling(net: SubnetModel) -> Coupling:
    """A net's coupling with its trace, which is found again where the coupling was read from a file.

    Raises:
        SlimError: The model is coupled otherwise than its bundle says.
    """
    if net.coupling.trace is None:
        assert net.example is not None
        with net.using("dense"):
            fresh = couple_model(net.model, net.example, net.selection)
        difference = coupling_difference(net.coupling, fresh)
        if difference:
            raise SlimError(
                f"the model couples its channels otherwise than when the bundle was made: {difference}; use the "
                "versions of the model's library and of PyTorch that made it"
            )
        net.coupling = replace(net.coupling, trace=fresh.trace)
    return net.coupling


def coupling_difference(a: Coupling, b: Coupling) -> str | None:
    """In words, the first way in which two couplings would remove different things; ``None`` where they agree."""
    if a.n_units != b.n_units:
        return f"{a.n_units} units, now {b.n_units}"
    for x, y in zip(a.groups, b.groups, strict=False):
        if (x.start, x.stop) != (y.start, y.stop):
            return f"group {x.name!r} has units {x.start} to {x.stop}, now {y.name!r} {y.start} to {y.stop}"
    if set(a.fields) != set(b.fields):
        return f"{sorted(set(a.fields) ^ set(b.fields))[0]!r} is touched by units in one of them only"
    for name, fields in a.fields.items():
        now = b.fields[name]
        if len(fields) != len(now) or not all(torch.equal(u, v) for u, v in zip(fields, now, strict=True)):
            return f"the units of {name!r} differ"
    return None
