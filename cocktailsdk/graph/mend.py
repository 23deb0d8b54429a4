"""Mending modules whose parameters were cut: their counts, and the numbers their code reshapes by."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from jaxtyping import Bool
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from .coupling import Node, Norm, Trace
from .layers import SlimLayerNorm, SlimRMSNorm

__all__ = ["Options", "Sizes", "mend", "sizes_of", "surviving"]


@dataclass
class Sizes:
    """Which sizes a module saw change.

    Attributes:
        changed: For each size that shrank somewhere, what it became, in order of appearance.
    """

    changed: dict[int, list[int]] = field(default_factory=dict)

    def add(self, old: int, new: int) -> None:
        """One dimension that went from ``old`` to ``new``."""
        if old != new and new not in self.changed.setdefault(old, []):
            self.changed[old].append(new)


def kept_along(units: Tensor, keep: Bool[Tensor, " units_and_stays"]) -> dict[int, int]:
    """How many positions are left along each dimension that a unit field varies in."""
    mask = keep[units]
    out = {}
    for d in range(mask.dim()):
        if mask.shape[d] > 1:
            out[d] = int(mask.movedim(d, 0).flatten(1).any(1).sum())
    return out


def new_shape(node: Node, keep: Bool[Tensor, " units_and_stays"]) -> tuple[int, ...]:
    """A node's shape in the slim model."""
    shape = list(node.shape or ())
    for units in node.units:
        for d, n in kept_along(units, keep).items():
            shape[d] = min(shape[d], n)
    return tuple(shape)


def surviving(value: Tensor, node: Node, keep: Bool[Tensor, " units_and_stays"]) -> Tensor:
    """What is left of a node's value in the slim model."""
    for units in node.units:
        mask = keep[units]
        for d in range(mask.dim()):
            if mask.shape[d] > 1:
                left = mask.movedim(d, 0).flatten(1).any(1)
                if left.numel() == value.shape[d]:
                    value = value.index_select(d, left.nonzero().flatten().to(value.device))
    return value


def sizes_of(trace: Trace, keep: Bool[Tensor, " units_and_stays"]) -> dict[str, Sizes]:
    """For each module the sizes that change in what it runs itself."""
    out: dict[str, Sizes] = {}
    for node in trace.nodes:
        if node.units and node.shape is not None:
            seen = out.setdefault(node.module, Sizes())
            for old, new in zip(node.shape, new_shape(node, keep), strict=True):
                seen.add(old, new)
    return out


Options = dict[str, dict[str, list[int]]]
"""By module path and attribute, the values it may need, the likeliest first."""


def mend(
    slim: nn.Module,
    original: nn.Module,
    trace: Trace,
    keep: Bool[Tensor, " units_and_stays"],
    chosen: Mapping[str, Mapping[str, int]] | None = None,
) -> Options:
    """Mends a model whose parameters were cut.

    Args:
        slim: The cut copy; changed in place.
        original: The model it was cut from.
        trace: The original's trace.
        keep: For each unit whether it stays; a last entry, True, for what belongs to no unit.
        chosen: Values of attributes that are known; of the others the likeliest is taken.

    Returns:
        Attributes that equal a size which shrank, with all that they may have become.
    """
    before = dict(original.named_modules())
    sizes = sizes_of(trace, keep)
    options: Options = {}
    for path, module in list(slim.named_modules()):
        was = before[path]
        if path in trace.norms and _narrowed(module, was, trace.norms[path], sizes.get(path)):
            norm = trace.norms[path]
            make = SlimRMSNorm if norm.root_mean_square else SlimLayerNorm
            weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
            made = make(weight, bias, channels=norm.channels, axis=norm.axis, eps=norm.eps)
            slim.set_submodule(path, made.train(module.training))
        elif path in trace.pads:
            _mend_padding(slim, path, trace, keep, module.training)
        elif not _mend_known(module, was):
            seen = sizes.get(path, Sizes())
            for name, parameter in module.named_parameters(recurse=False):
                for old, new in zip(getattr(was, name).shape, parameter.shape, strict=True):
                    seen.add(old, new)
            found = {name: [*seen.changed[value], value] for name, value in _integers(module) if value in seen.changed}
            if found:
                options[path] = found
                known = (chosen or {}).get(path, {})
                for name, values in found.items():
                    setattr(module, name, known.get(name, values[0]))
    return options


def _narrowed(module: nn.Module, was: nn.Module, norm: Norm, sizes: Sizes | None) -> bool:
    """Whether a norm's channels shrank (one without parameters is known by what it ran)."""
    own = list(module.named_parameters(recurse=False))
    if own:
        return any(p.shape != getattr(was, n).shape for n, p in own)
    return sizes is not None and norm.channels in sizes.changed


def _mend_known(module: nn.Module, was: nn.Module) -> bool:
    """Mends the counts of PyTorch's own layers (and of what inherits from them)."""
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, _ConvNd):
        old_groups, per_group = was.groups, was.weight.shape[0 if isinstance(module, _ConvTransposeNd) else 1]
        rows, columns = module.weight.shape[:2]
        if isinstance(module, _ConvTransposeNd):
            module.in_channels, module.out_channels = rows, columns * old_groups
        elif old_groups > 1 and per_group == 1:  # depthwise: groups go with their channels
            multiplier = was.out_channels // old_groups
            module.groups = module.in_channels = rows // multiplier
            module.out_channels = rows
        else:
            module.out_channels, module.in_channels = rows, columns * old_groups
    elif isinstance(module, _NormBase):
        count = next((t.shape[0] for t in (module.weight, module.running_mean) if t is not None), None)
        if count is not None:
            module.num_features = count
    elif isinstance(module, nn.GroupNorm):
        if module.weight is not None:
            size = was.num_channels // was.num_groups
            module.num_channels = module.weight.shape[0]
            module.num_groups = module.num_channels // size
    elif isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = module.weight.shape
    else:
        return False
    return True


def _integers(module: nn.Module) -> Iterator[tuple[str, int]]:
    for name, value in list(vars(module).items()):
        if isinstance(value, int) and not isinstance(value, bool) and not name.startswith("_") and value > 1:
            yield name, value


def _mend_padding(slim: nn.Module, path: str, trace: Trace, keep: Bool[Tensor, " units_and_stays"], training: bool) -> None:
    """Puts the module's graph, with the amounts of padding that are left, in its place."""
    by_name = {n.name: n for n in trace.nodes}
    graph = copy.deepcopy(trace.pads[path])
    for node in graph.graph.nodes:
        if node.op != "call_function" or node.target._opname not in ("pad", "constant_pad_nd"):
            continue
        record = by_name[node.meta["name"]]
        amounts = list(node.args[1])
        rank = len(record.shape or ())
        for units in record.units:
            mask = keep[units]
            for i in range(0, len(amounts), 2):
                dim = rank - 1 - i // 2
                if mask.shape[dim] > 1:
                    left = mask.movedim(dim, 0).flatten(1).any(1)
                    before, after = node.args[1][i : i + 2]
                    amounts[i] = int(left[:before].sum())
                    amounts[i + 1] = int(left[left.numel() - after :].sum()) if after else 0
        node.args = (node.args[0], amounts, *node.args[2:])
    graph.recompile()
    slim.set_submodule(path, graph.train(training))


