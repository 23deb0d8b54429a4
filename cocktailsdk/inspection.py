"""What of a model is prunable, what is coupled, and what is kept whole and why."""

from __future__ import annotations

import logging
import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from .adapters import example_inputs_for
from .errors import AdapterError, CocktailError
from .graph import Coupling, Group, Kept, Weight, couple
from .net import CocktailNet
from .patterns.nm import covered
from .selection import Selection
from .statistics import device_of, to_device

__all__ = ["ChannelGroup", "Eligibility", "Inspection", "Layer", "Saving", "inspect"]

log = logging.getLogger(__name__)

RUNS = (2, 4, 8, 16)
"""The M of N:M for which coverage is told."""

HALF = 0.5
"""The sparsity for which savings are told."""

LONGEST_REASON = 400
"""Characters kept of why a model cannot be followed; the exporter's own words can fill pages."""


@dataclass(frozen=True)
class Eligibility:
    """Whether a pattern may touch a layer.

    Attributes:
        eligible: Whether it may, by default.
        reason: Why not; empty where it may.
    """

    eligible: bool
    reason: str = ""


@dataclass(frozen=True)
class Layer:
    """A weight that is multiplied with activations.

    Attributes:
        name: The parameter's name.
        module: Path of the module that owns it.
        op: ``"conv"``, ``"conv_transpose"``, ``"linear"``, ``"matmul"``; in a model whose graph is not known, the
            module's class.
        shape: The parameter's shape.
        params: Its number of elements.
        flops: FLOPs (2 x multiply-adds) of all its uses in one forward pass on the example inputs.
        role: ``"first convolution"``, ``"classifier"`` or nothing.
        unstructured: Whether single weights may go.
        nm: Whether N:M runs fit.
        coverage: For M = 2, 4, 8, 16 the share of its elements that lie in full runs of M input channels.
        channel: Whether any of its output channels may go.
        groups: Names of the channel groups that its output channels belong to.
    """

    name: str
    module: str
    op: str
    shape: tuple[int, ...]
    params: int
    flops: int
    role: str
    unstructured: Eligibility
    nm: Eligibility
    coverage: Mapping[int, float]
    channel: Eligibility
    groups: tuple[str, ...]


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that go together, and among which a ratio is chosen.

    Attributes:
        name: Its name.
        units: Number of units; a unit goes or stays as one.
        channels: Channels that a unit stands for, in the widest place.
        rows: Weights that lose output channels with it.
        entries: Biases, norm weights, statistics and other tensors that lose entries.
        columns: Weights that lose input channels.
    """

    name: str
    units: int
    channels: int
    rows: tuple[str, ...]
    entries: tuple[str, ...]
    columns: tuple[str, ...]


@dataclass(frozen=True)
class Saving:
    """What a pattern would leave.

    Attributes:
        pattern: The pattern's registered name.
        subnet: The subnetwork that is counted: half of what the pattern may touch is gone.
        params: Parameters that are not zero or are left.
        flops: FLOPs as dense kernels run them; only channels make them fewer.
        nonzero_flops: FLOPs by parameters that are left.
        coverage: Share of all parameters that the pattern may touch.
    """

    pattern: str
    subnet: str
    params: int
    flops: int
    nonzero_flops: int
    coverage: float


@dataclass(frozen=True)
class Inspection:
    """What :func:`inspect` found.

    Attributes:
        model: The model's class.
        inputs: The example inputs, in words.
        followed: Whether the graph is known; otherwise no channel can go, and ``kept`` says why.
        layers: Every weight, in order of execution.
        groups: The channel groups.
        kept: What is kept whole, and why.
        params: Parameters of the model.
        flops: FLOPs (2 x multiply-adds) of one forward pass on the example inputs.
        savings: What each pattern could save.
    """

    model: str
    inputs: tuple[str, ...]
    followed: bool
    layers: tuple[Layer, ...]
    groups: tuple[ChannelGroup, ...]
    kept: tuple[Kept, ...]
    params: int
    flops: int
    savings: tuple[Saving, ...]

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


def inspect(model: nn.Module, example_inputs: Any = (), example_kwargs: Mapping[str, Any] | None = None) -> Inspection:
    """Find what is prunable, what is coupled, and what is kept whole and why.

    It does not fail on models that cannot be followed: all their channels are kept, with the reason.

    Args:
        model: Any module. It is run in eval mode on the example inputs, and left as it was.
        example_inputs: Positional arguments of one forward pass (a single tensor is taken as one); where none are
            given, an adapter is asked for them.
        example_kwargs: Keyword arguments of that pass.

    Example:
        ```python
        found = cocktail.inspect(model, example_inputs=(torch.randn(1, 3, 32, 32),))
        for group in found.groups:
            print(group.name, group.units)
        ```
    """
    args: tuple[Any, ...] = (example_inputs,) if isinstance(example_inputs, Tensor) else tuple(example_inputs)
    kwargs = dict(example_kwargs or {})
    if isinstance(model, CocktailNet):
        if not args and not kwargs and model.example is not None:
            args, kwargs = model.example
        model = model.model
    try:
        if not args and not kwargs:
            args, kwargs = example_inputs_for(model)
        args, kwargs = to_device((args, kwargs), device_of(model))
        coupling = couple(model, args, kwargs)
    except CocktailError as error:
        log.info("%s cannot be followed: %s", type(model).__name__, error)
        flops = {} if isinstance(error, AdapterError) else _measured_flops(model, args, kwargs)
        reason = textwrap.shorten(str(error), LONGEST_REASON, placeholder=" …")
        return _unfollowed(model, _described(args, kwargs), reason, flops)
    return _followed(model, _described(args, kwargs), coupling)


def _followed(model: nn.Module, inputs: tuple[str, ...], coupling: Coupling) -> Inspection:
    selection = Selection()
    kept_by = {k.where: k.reason for k in coupling.kept}
    groups_of: dict[str, list[str]] = {}
    for g in coupling.groups:
        for weight in g.producers:
            groups_of.setdefault(weight, []).append(g.name)
    layers = tuple(
        _layer(w, selection.why_not(w) or "", tuple(groups_of.get(w.name, ())), kept_by.get(w.name, ""))
        for w in coupling.weights
    )
    return Inspection(
        model=type(model).__name__,
        inputs=inputs,
        followed=True,
        layers=layers,
        groups=tuple(_group(g) for g in coupling.groups),
        kept=coupling.kept,
        params=coupling.params(),
        flops=coupling.flops(),
        savings=_savings(coupling, selection.eligible(coupling)),
    )


def _layer(w: Weight, why_not: str, groups: tuple[str, ...], kept: str) -> Layer:
    coverage = {m: covered(w, m) / w.numel for m in RUNS} if w.numel else dict.fromkeys(RUNS, 0.0)
    runs = why_not or ("" if coverage[RUNS[0]] else "fewer input channels than the shortest run of N:M")
    return Layer(
        name=w.name,
        module=w.module,
        op=w.op,
        shape=w.shape,
        params=w.numel,
        flops=2 * w.macs,
        role=w.role,
        unstructured=Eligibility(not why_not, why_not),
        nm=Eligibility(not runs, runs),
        coverage=coverage,
        channel=Eligibility(bool(groups), kept or ("" if groups else "makes no channels that can go")),
        groups=groups,
    )


def _group(g: Group) -> ChannelGroup:
    def of(kind: str) -> tuple[str, ...]:
        return tuple(dict.fromkeys(t.tensor for t in g.touches if t.kind == kind))

    return ChannelGroup(g.name, g.size, g.channels, of("rows"), of("entries"), of("columns"))


def _savings(coupling: Coupling, eligible: Iterable[Weight]) -> tuple[Saving, ...]:
    weights = list(eligible)
    params, flops = coupling.params(), coupling.flops()
    if not params:
        return ()

    def zeros(pattern: str, subnet: str, may: Mapping[str, int]) -> Saving:
        gone = {w.name: round(HALF * may[w.name]) for w in weights}
        idle = sum(2 * w.macs * gone[w.name] // w.numel for w in weights if w.numel)
        return Saving(pattern, subnet, params - sum(gone.values()), flops, flops - idle, sum(may.values()) / params)

    removed = torch.zeros(coupling.n_units, dtype=torch.bool)
    for g in coupling.groups:
        removed[g.start : g.start + min(round(HALF * g.size), g.size - 1)] = True
    left, run = coupling.params(removed), coupling.flops(removed)
    everything = torch.ones(coupling.n_units, dtype=torch.bool)
    return (
        zeros("unstructured", f"unstructured@{HALF:g}", {w.name: w.numel for w in weights}),
        *(zeros("n:m", f"{m // 2}:{m}", {w.name: covered(w, m) for w in weights}) for m in RUNS[:3]),
        Saving("channel", f"channel@{HALF:g}", left, run, run, 1 - coupling.params(everything) / params),
    )


def _unfollowed(model: nn.Module, inputs: tuple[str, ...], reason: str, flops: Mapping[str, int]) -> Inspection:
    why = Eligibility(False, "the model's graph is not known")
    layers = tuple(
        Layer(
            name=f"{path}.weight" if path else "weight",
            module=path,
            op=type(module).__name__,
            shape=tuple(module.weight.shape),
            params=module.weight.numel(),
            flops=flops.get(path, 0),
            role="",
            unstructured=why,
            nm=why,
            coverage=dict.fromkeys(RUNS, 0.0),
            channel=why,
            groups=(),
        )
        for path, module in model.named_modules()
        if isinstance(getattr(module, "weight", None), nn.Parameter) and module.weight.ndim >= 2
    )
    return Inspection(
        model=type(model).__name__,
        inputs=inputs,
        followed=False,
        layers=layers,
        groups=(),
        kept=(Kept("", reason),),
        params=sum(p.numel() for p in model.parameters()),
        flops=flops.get("", 0),
        savings=(),
    )


def _measured_flops(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, int]:
    """FLOPs by module path (``""``: in all) of one real pass; nothing where the model does not run."""
    modes = [(m, m.training) for m in model.modules()]
    counter = FlopCounterMode(display=False)
    model.eval()
    try:
        with torch.no_grad(), counter:
            model(*args, **kwargs)
    except Exception as error:  # the model's own failure; what is counted here is only told
        log.info("%s does not run on the example inputs: %s", type(model).__name__, error)
        return {}
    finally:
        for m, training in modes:
            m.training = training
    root = type(model).__name__
    counts = {path.removeprefix(f"{root}."): sum(ops.values()) for path, ops in counter.get_flop_counts().items()}
    return {**counts, "": counter.get_total_flops()}


def _described(args: Iterable[Any], kwargs: Mapping[str, Any]) -> tuple[str, ...]:
    def words(value: Any) -> str:
        if isinstance(value, Tensor):
            return f"{'x'.join(map(str, value.shape)) or 'scalar'} {str(value.dtype).removeprefix('torch.')}"
        if isinstance(value, list | tuple):
            return f"[{', '.join(words(v) for v in value)}]"
        return repr(value) if isinstance(value, bool | int | float | str) or value is None else type(value).__name__

    return (*(words(a) for a in args), *(f"{k}={words(v)}" for k, v in kwargs.items()))
