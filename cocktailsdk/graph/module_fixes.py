"""Fixes modules whose parameters were cut: their counts, and the numbers that their code reshapes by."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice, product
from typing import Any

from jaxtyping import Bool
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from ..errors import SlimError
from .attention import SlimMultiheadAttention
from .code_names import names_read
from .coupling import Norm, Trace
from .layers import SlimGroupNorm, SlimLayerNorm, SlimRMSNorm
from .rewritten_module import with_forward
from .surviving import Sizes, sizes_of, surviving_along

__all__ = ["ModuleFixes", "Options", "Value", "assign", "fix_modules"]


Value = int | tuple[int, ...] | list[int]
"""Types of attributes that code takes sizes from."""

READS_SIZES = frozenset(
    """
    view reshape unflatten expand split split_with_sizes chunk repeat slice narrow mean _unsafe_view
    """.split()  # noqa: SIM905
)
"""Ops whose arguments a module's code takes from numbers."""

Options = dict[str, dict[str, list[Value]]]
"""By module path and attribute, the values it may need, the likeliest first."""


@dataclass
class ModuleFixes:
    """Changes that a slim model needs besides the counts of known layers.

    Attributes:
        attributes: By module path, the values of its attributes.
        forwards: By module path, its own code with other sizes (see :mod:`cocktailsdk.graph.rewrite`).
    """

    attributes: dict[str, dict[str, Value]] = field(default_factory=dict)
    forwards: dict[str, fx.Graph] = field(default_factory=dict)


def fix_modules(
    slim: nn.Module,
    original: nn.Module,
    trace: Trace,
    keep: Bool[Tensor, " units_and_stays"],
    chosen: ModuleFixes | None = None,
) -> Options:
    """Fixes the modules of a model whose parameters were cut.

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
    reading = {n.module for n in trace.nodes if n.op in READS_SIZES and n.module in sizes} | trace.counted
    options: Options = {}
    numbers = _layer_indices(before)
    for path, module in list(slim.named_modules()):
        was = before[path]
        # Norms first: they may be subclasses of layers whose counts alone would not make them right.
        if path in trace.norms and _narrowed(module, was, trace.norms[path], sizes.get(path)):
            norm = trace.norms[path]
            make = {"layer": SlimLayerNorm, "rms": SlimRMSNorm, "group": SlimGroupNorm}[norm.kind]
            weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
            made = make(weight, bias, channels=norm.channels, axis=norm.axis, eps=norm.eps)
            _replace_module(slim, path, made.train(module.training))
        elif isinstance(module, nn.MultiheadAttention):
            changed = any(p.shape != q.shape for p, q in zip(module.parameters(), was.parameters(), strict=True))
            if changed:
                if module.in_proj_weight is not None and not isinstance(module.in_proj_weight, nn.Parameter):
                    raise SlimError(
                        f"the input projection of {path!r} is computed before each pass, which no slim attention does",
                        module=path,
                    )
                stand_in = SlimMultiheadAttention(module, was.head_dim)
                _replace_module(slim, path, stand_in.train(module.training))
        elif path in trace.pads:
            _fix_padding(slim, path, trace, keep, module.training)
        elif _fix_known_layer(module, was):
            if path in trace.counted:
                options[path] = {}
        else:
            seen = sizes.get(path, Sizes())
            for name, parameter in module.named_parameters(recurse=False):
                for old, new in zip(getattr(was, name).shape, parameter.shape, strict=True):
                    seen.add(old, new)
            found = _attributes(module, seen.changed)
            found = {name: values for name, values in found.items() if (path, name) not in numbers}
            if found:
                options[path] = found
                known = chosen.attributes.get(path, {}) if chosen is not None else {}
                assign(module, {name: known.get(name, values[0]) for name, values in found.items()})
            if path in reading:
                options.setdefault(path, {})
    # Innermost first, so that a rewritten parent holds its rewritten children.
    forwards = chosen.forwards if chosen is not None else {}
    for path in sorted(forwards, key=lambda p: -p.count(".")):
        _replace_module(slim, path, with_forward(slim.get_submodule(path), forwards[path]))
    return options


def _replace_module(slim: nn.Module, path: str, made: nn.Module) -> None:
    """Puts a module in the place of another, wherever that is registered."""
    was = slim.get_submodule(path)
    for name in [name for name, m in slim.named_modules(remove_duplicate=False) if m is was]:
        slim.set_submodule(name, made)


def _narrowed(module: nn.Module, was: nn.Module, norm: Norm, sizes: Sizes | None) -> bool:
    """Whether a norm's channels shrank (one without parameters is known by what it ran)."""
    own = list(module.named_parameters(recurse=False))
    if own:
        return any(p.shape != getattr(was, n).shape for n, p in own)
    return sizes is not None and norm.channels in sizes.changed


def _fix_known_layer(module: nn.Module, was: Any) -> bool:
    """Updates the counts of PyTorch's own layers and of classes derived from them."""
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, _ConvNd):
        old_groups, per_group = was.groups, was.weight.shape[0 if isinstance(module, _ConvTransposeNd) else 1]
        rows, columns = module.weight.shape[:2]
        if isinstance(module, _ConvTransposeNd):
            # columns x groups outputs: a transposed convolution stores the outputs of one group.
            if old_groups == was.in_channels:  # depthwise: groups go with their channels
                module.groups = rows
            module.in_channels, module.out_channels = rows, columns * module.groups
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
    elif isinstance(module, nn.RNNBase):
        module.hidden_size, module.input_size = (getattr(module, f"weight_{to}_l0").shape[1] for to in ("hh", "ih"))
    elif isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = module.weight.shape
    else:
        return False
    return True


def _attributes(module: nn.Module, changed: Mapping[int, list[int]]) -> dict[str, list[Value]]:
    """Attributes that hold sizes which shrank, with all that they may have become.

    Those that the module's code does not read get one value, the likeliest. ``"config.NAME"`` stands for an attribute
    of the module's ``config`` that its code reads.
    """
    read = names_read(type(module))
    out: dict[str, list[Value]] = {}
    for name, value in list(vars(module).items()):
        options = [] if name.startswith("_") else _options(value, changed)
        if options:
            # A number that no method reads changes nothing that runs, but repr() and saved configs should show the new
            # size.
            out[name] = options if name in read else options[:1]
    config = getattr(module, "config", None)
    if "config" in read and hasattr(config, "__dict__"):
        for name, value in vars(config).items():
            options = _options(value, changed) if name in read and isinstance(value, int) else []
            if options:
                out[f"config.{name}"] = options[::-1]  # the config is the whole model's: as it was, where that will do
    return out


def _layer_indices(modules: Mapping[str, nn.Module]) -> set[tuple[str, str]]:
    """Modules' paths and attributes that say which layer a module is (``layer_idx``), whatever size they may equal.

    Those of layers with one path but for a number, whose values go with that number. Only runs with a cache read them,
    so no proof would miss them.
    """
    alike: dict[tuple[str, ...], list[tuple[str, list[int]]]] = {}
    for path in modules:
        parts = path.split(".")
        key = tuple("*" if part.isdecimal() else part for part in parts)
        alike.setdefault(key, []).append((path, [int(part) for part in parts if part.isdecimal()]))
    out: set[tuple[str, str]] = set()
    for key, members in alike.items():
        layers = [(path, at, vars(modules[path])) for path, at in members]
        for name in {n for _, _, attributes in layers for n, v in attributes.items() if type(v) is int}:
            having = [(path, at, v[name]) for path, at, v in layers if type(v.get(name)) is int]
            varies = len({value for _, _, value in having}) > 1
            if varies and any(len({value - at[i] for _, at, value in having}) == 1 for i in range(key.count("*"))):
                out.update((path, name) for path, _, _ in having)
    return out


def _options(value: Any, changed: Mapping[int, list[int]]) -> list[Value]:
    if isinstance(value, int) and not isinstance(value, bool):
        return [*changed[value], value] if value in changed else []
    # At most 8 sizes and 32 combinations: enough for shapes and splits, and long lists (labels, schedules) are no
    # sizes.
    if isinstance(value, tuple | list) and 0 < len(value) <= 8 and all(type(v) is int for v in value):
        choices = [[*changed.get(v, []), v] for v in value]
        made: list[Value] = [type(value)(c) for c in islice(product(*choices), 32)]
        return made if len(made) > 1 else []
    return []


def assign(module: nn.Module, values: Mapping[str, Value]) -> None:
    """Sets attributes; those of a config on a copy that is the module's own."""
    for name, value in values.items():
        if name.startswith("config."):
            own = name.removeprefix("config.")
            # transformers' modules share one config object, so a module that needs another number gets a copy of its
            # own.
            if getattr(module.config, own) != value:
                module.config = copy.copy(module.config)
                setattr(module.config, own, value)
        else:
            setattr(module, name, value)


def _fix_padding(
    slim: nn.Module, path: str, trace: Trace, keep: Bool[Tensor, " units_and_stays"], training: bool
) -> None:
    """Puts the module's graph, with the amounts of padding that are left, in its place."""
    by_name = {n.name: n for n in trace.nodes}
    graph = copy.deepcopy(trace.pads[path])
    for node in graph.nodes:
        if node.op != "call_function" or node.target._opname not in ("pad", "constant_pad_nd"):
            continue
        record = by_name[node.meta["name"]]
        amounts = list(node.args[1])
        rank = len(record.shape or ())
        for units in record.units:
            along = surviving_along(units, keep)
            for i in range(0, len(amounts), 2):
                survives = along.get(rank - 1 - i // 2)
                if survives is not None:
                    before, after = node.args[1][i : i + 2]
                    amounts[i] = int(survives[:before].sum())
                    amounts[i + 1] = int(survives[survives.numel() - after :].sum()) if after else 0
        node.args = (node.args[0], amounts, *node.args[2:])
    _replace_module(slim, path, with_forward(slim.get_submodule(path), graph).train(training))
