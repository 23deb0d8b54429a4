"""Inspects a model: traces it, builds its coupling, and collects the findings."""

from __future__ import annotations

import logging
import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..errors import CocktailError, PatternError
from ..graph import Coupling, Kept, Stay, Weight, couple, unsupported_modules
from ..graph.export import BuildsParameters
from ..masks.tiles import covered_by_runs
from ..net.subnet_model import SubnetModel
from ..net.target_modules import Selection
from ..net.tracing import Example, example_of
from ..patterns import Channel
from ..utils.devices import device_of
from ..utils.grouping import grouped
from ..utils.modes import evaluating
from ..utils.nested import to_device
from ..utils.undo import unchanged
from .channel_groups import channel_groups
from .findings import Eligibility, Layer, Saving
from .inspection import Inspection
from .measuring import measured_flops

__all__ = ["inspect", "kept_whole"]

log = logging.getLogger(__name__)

RUNS = (2, 4, 8, 16)
"""The M of N:M for which coverage is told."""

HALF = 0.5
"""The sparsity for which savings are told."""

NOTHING_RETURNED = (
    "no weight takes part in a tensor that the model returns; return tensors, alone or in tuples, lists, mappings or "
    "dataclasses"
)

LONGEST_REASON = 400
"""Characters kept of why a model cannot be followed; the exporter's own words can fill pages."""


def inspect(model: nn.Module, example_inputs: Any = (), example_kwargs: Mapping[str, Any] | None = None) -> Inspection:
    """Find which channels are prunable, which are coupled, and which are not pruned and why.

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
    if not isinstance(model, nn.Module):
        raise PatternError(f"inspect takes an nn.Module, not {type(model).__name__}")
    example: Example = ((), {})
    selection = Selection.of(model)
    if isinstance(model, SubnetModel):
        if not _has_inputs(example_inputs) and not example_kwargs and model.example is not None:
            example_inputs, example_kwargs = model.example
        selection = model.selection
        model = model.model
    with unchanged(model):
        try:
            example = to_device(example_of(model, example_inputs, example_kwargs), device_of(model))
            return _found(model, example, selection)
        except Exception as error:  # whatever a model's code does, the answer is a reason
            log.info("%s cannot be followed: %s", type(model).__name__, error, exc_info=True)
            lazy = any(is_lazy(t) for t in _every(model).values())
            flops = {} if lazy or not any(example) else _measured_flops(model, *example)
            words = str(error) if isinstance(error, CocktailError) else f"{type(error).__name__}: {error}"
            reason = textwrap.shorten(words, LONGEST_REASON, placeholder=" …")
            return _unfollowed(model, _described(*example), reason, flops)


def _has_inputs(inputs: Any) -> bool:
    return isinstance(inputs, Tensor) or not isinstance(inputs, list | tuple) or bool(inputs)


def _found(model: nn.Module, example: Example, selection: Selection) -> Inspection:
    args, kwargs = example
    exclude = selection.keeps_channels if selection.whole else None
    try:
        return _followed(model, _described(args, kwargs), couple(model, args, kwargs, exclude=exclude), selection)
    except BuildsParameters as error:
        log.info("looking at the model as it is after a first forward pass: %s", error)
        with evaluating(model, clear_caches=True), torch.no_grad():
            model(*args, **kwargs)
        coupling = couple(model, args, kwargs, exclude=exclude)
        found = _followed(model, _described(args, kwargs), coupling, selection)
        return replace(found, kept=(Kept("", str(error)), *found.kept))


def _followed(model: nn.Module, inputs: tuple[str, ...], coupling: Coupling, selection: Selection) -> Inspection:
    stays = _stays(coupling)
    kept = (*kept_whole(coupling), *unsupported_modules(model))
    if not kept and not coupling.weights and any(True for _ in model.parameters()):
        kept = (Kept("", NOTHING_RETURNED),)
    reasons = {k.where: k.reason for k in kept}
    touched = grouped(((touch.kind, touch.tensor), g.name) for g in coupling.groups for touch in g.touches)
    layers = []
    for w in coupling.weights:
        made, read = (tuple(dict.fromkeys(touched.get((kind, w.name), ()))) for kind in ("rows", "columns"))
        layers.append(_layer(w, selection.why_not(w) or "", made, read, reasons.get(w.name, "")))
    return Inspection(
        model=type(model).__name__,
        inputs=inputs,
        followed=True,
        layers=tuple(layers),
        groups=channel_groups(model, coupling),
        kept=kept,
        params=coupling.params(),
        flops=coupling.flops(),
        savings=_savings(coupling, selection.eligible(coupling)),
        stays=stays,
        modules=tuple(path for path, _ in model.named_modules() if path),
        tensors=_tensors(model),
        proven=not any(p.is_meta for p in model.parameters()),
    )


def _stays(coupling: Coupling) -> tuple[Stay, ...]:
    """Positions that must stay, without axes that have no channels (the height of a kernel)."""
    if coupling.trace is None:
        return ()
    axes = {w.name: (w.out_axis, w.in_axis) for w in coupling.weights}
    return tuple(s for s in coupling.trace.stays if s.axis in axes.get(s.tensor, (s.axis,)))


def kept_whole(coupling: Coupling) -> tuple[Kept, ...]:
    """Parts that are not pruned; weights with the nearest cause."""
    stays = _stays(coupling)
    made = {k.where for k in coupling.kept}
    axes = {w.name: w.out_axis for w in coupling.weights}
    nearest = {s.tensor: s for s in stays if s.tensor in made and s.axis == axes.get(s.tensor, 1)}

    def caused(k: Kept) -> Kept:
        stay = nearest.get(k.where)
        if stay is None:
            return k
        share = "" if stay.positions == stay.of else f"{stay.positions} of {stay.of} channels: "
        return Kept(k.where, share + stay.reason)

    return tuple(map(caused, coupling.kept))


def _tensors(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(t.shape) for name, t in _every(model).items() if not is_lazy(t)}


def _every(model: nn.Module) -> dict[str, Tensor]:
    return dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)])


def _layer(w: Weight, why_not: str, groups: tuple[str, ...], reads: tuple[str, ...], kept: str) -> Layer:
    coverage = {m: covered_by_runs(w, m) / w.numel for m in RUNS} if w.numel else dict.fromkeys(RUNS, 0.0)
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
        reads=reads,
        axes=(w.out_axis, w.in_axis),
    )


def _savings(coupling: Coupling, eligible: Iterable[Weight]) -> tuple[Saving, ...]:
    weights = list(eligible)
    params, flops = coupling.params(), coupling.flops()
    if not params:
        return ()

    def zeros(pattern: str, subnet: str, may: Mapping[str, int]) -> Saving:
        zeros_of = {w.name: round(HALF * may[w.name]) for w in weights}
        idle = sum(2 * w.macs * zeros_of[w.name] // w.numel for w in weights if w.numel)
        return Saving(pattern, subnet, params - sum(zeros_of.values()), flops, flops - idle, sum(may.values()) / params)

    removed = torch.zeros(coupling.n_units, dtype=torch.bool)
    groups = Channel().groups(coupling)
    for g in groups:
        removed[g.start : g.start + min(round(HALF * g.size), g.size - 1)] = True
    params_left, run = coupling.params(removed), coupling.flops(removed)
    everything = torch.zeros(coupling.n_units, dtype=torch.bool)
    for g in groups:
        everything[g.start : g.stop] = True
    return (
        zeros("unstructured", f"unstructured@{HALF:g}", {w.name: w.numel for w in weights}),
        *(zeros("n:m", f"{m // 2}:{m}", {w.name: covered_by_runs(w, m) for w in weights}) for m in RUNS[:3]),
        Saving("channel", f"channel@{HALF:g}", params_left, run, run, 1 - coupling.params(everything) / params),
    )


def _unfollowed(model: nn.Module, inputs: tuple[str, ...], reason: str, flops: Mapping[str, int]) -> Inspection:
    why = Eligibility(False, "the model's graph is not known")
    layers = tuple(
        Layer(
            name=f"{path}.weight" if path else "weight",
            module=path,
            op=type(module).__name__,
            shape=tuple(weight.shape),
            params=weight.numel(),
            flops=flops.get(path, 0),
            role="",
            unstructured=why,
            nm=why,
            coverage=dict.fromkeys(RUNS, 0.0),
            channel=why,
            groups=(),
        )
        for path, module in model.named_modules()
        if (weight := dict(module.named_parameters(recurse=False)).get("weight")) is not None
        and not is_lazy(weight)
        and weight.ndim >= 2
    )
    return Inspection(
        model=type(model).__name__,
        inputs=inputs,
        followed=False,
        layers=layers,
        groups=(),
        kept=(Kept("", reason), *unsupported_modules(model)),
        params=sum(p.numel() for p in model.parameters() if not is_lazy(p)),
        flops=flops.get("", 0),
        savings=(),
        modules=tuple(path for path, _ in model.named_modules() if path),
        tensors=_tensors(model),
    )


def _measured_flops(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, int]:
    """FLOPs by module path (``""``: in all) of one real pass; nothing where the model does not run."""
    try:
        with evaluating(model, clear_caches=True):
            return measured_flops(model, args, kwargs)
    except Exception as error:  # the model's own failure; what is counted here is only told
        log.info("%s does not run on the example inputs: %s", type(model).__name__, error)
        return {}


def _described(args: Iterable[Any], kwargs: Mapping[str, Any]) -> tuple[str, ...]:
    def words(value: Any) -> str:
        if isinstance(value, Tensor):
            return f"{'x'.join(map(str, value.shape)) or 'scalar'} {str(value.dtype).removeprefix('torch.')}"
        if isinstance(value, list | tuple):
            return f"[{', '.join(words(v) for v in value)}]"
        return repr(value) if isinstance(value, bool | int | float | str) or value is None else type(value).__name__

    return (*(words(a) for a in args), *(f"{k}={words(v)}" for k, v in kwargs.items()))
