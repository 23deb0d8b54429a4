"""Code that a model runs in training mode only: auxiliary heads, deep supervision, branches on ``self.training``.

The graph is that of eval mode. Where parameters are left that nothing in it reads, the graph of training mode is joined
to it: calls that both modes share are kept once, so that one axis has one set of labels whichever mode reads it.
"""

from __future__ import annotations

import logging
import warnings
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.utils.spectral_norm import SpectralNorm

from ..errors import described
from ..utils.modes import modes_restored
from .code_names import names_read
from .determinism import seeded_rng
from .export import Exported, export_whole, merge, op_name, shape_of, silenced, with_modules, within

if TYPE_CHECKING:
    from .rules import Context

__all__ = [
    "Idle",
    "Unreached",
    "followed",
    "idle",
    "in_training",
    "joined",
    "pin_unreached",
    "reads_training",
    "training_only",
    "with_training",
]

log = logging.getLogger(__name__)

_GRADIENTS = "is_grad_enabled"

_INDIFFERENT = (nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.Identity, nn.Linear, _ConvNd, nn.Embedding)
"""PyTorch's modules that compute the same in both modes."""


Idle = Mapping[str, Sequence[str]]
"""Paths of the modules whose parameters the graph of eval mode does not read, each with the names of these."""


def idle(exported: Exported) -> Idle:
    """The modules whose parameters a whole exported model does not read; none where only parts were exported."""
    if exported.scopes != ("",):
        return {}
    read = {exported.tensors[n.name] for n in exported.graph.nodes if n.name in exported.tensors and n.users}
    out: dict[str, list[str]] = {}
    for name in exported.shapes:
        if name in exported.trainable and name not in read:
            out.setdefault(name.rpartition(".")[0], []).append(name)
    return out


def reads_training(model: nn.Module) -> bool:
    """Whether code that is not PyTorch's own asks for the mode, or whether gradients are recorded."""
    return not _asked(model).isdisjoint(("training", _GRADIENTS))


def _asked(model: nn.Module) -> set[str]:
    classes = {type(m) for m in model.modules()}
    return set().union(*(names_read(cls) for cls in classes if not _known(cls)))


def _known(cls: type) -> bool:
    return cls.__module__.partition(".")[0] == "torch"


@contextmanager
def in_training(model: nn.Module) -> Iterator[None]:
    """Training mode for the model's own code, and back.

    PyTorch's layers stay in eval mode, batch norms and dropouts derived from them too: each channel's batch statistics
    are its own, and what is drawn at random is no matter of channels. Layers that compute the same in both modes are in
    training mode, since the model's code may ask for that of a part (``self.head.training``). Gradients are recorded
    only where the model's code asks whether they are.
    """
    with modes_restored(model):
        for m in model.modules():
            # Batch statistics, dropout and power iteration would differ between slim and masked for reasons other than
            # channels.
            draws = isinstance(m, _NormBase | _DropoutNd) or any(
                isinstance(hook, SpectralNorm) for hook in m._forward_pre_hooks.values()
            )
            m.training = not draws and (isinstance(m, _INDIFFERENT) or not _known(type(m)))
        with torch.set_grad_enabled(_GRADIENTS in _asked(model)):
            yield


def followed(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any] | None) -> Exported:
    """The graph of training mode.

    Args:
        model: A copy that is used for nothing else.
        args: Example positional inputs.
        kwargs: Example keyword inputs.

    Raises:
        Exception: Whatever ``torch.export`` or the model raises: targets may be missing.
    """
    with torch.no_grad(), in_training(model), warnings.catch_warnings(), silenced():
        warnings.simplefilter("ignore")
        program = export_whole(model, (tuple(args), dict(kwargs or {})))
        return with_modules(model, merge(model, {"": program}, {}))


def training_only(node: fx.Node) -> bool:
    """Whether a call is one of training mode alone."""
    return bool(node.meta.get("training"))


def joined(exported: Exported, training: Exported) -> Exported:
    """One graph of both modes. Calls of training mode that are not also those of eval mode come last."""
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    tensors: dict[str, str] = {}
    by_name: dict[str, fx.Node] = {}
    same: defaultdict[Any, deque[fx.Node]] = defaultdict(deque)
    inputs: list[fx.Node] = []
    # Calls of both modes that are equal, argument by argument, are one node. Arguments are nodes of the joined graph by
    # then, so equality propagates from the inputs on.
    for node in exported.graph.nodes:
        if node.op == "output":
            continue
        new = copies[node] = graph.node_copy(node, copies.__getitem__)
        if node.op == "placeholder":
            if node.name in exported.tensors:
                tensors[new.name] = exported.tensors[node.name]
                by_name.setdefault(exported.tensors[node.name], new)
            else:
                inputs.append(new)
        else:
            same[_key(new)].append(new)
    ends = next(n for n in exported.graph.nodes if n.op == "output").all_input_nodes
    outputs = [copies[n] for n in ends]

    free = iter(inputs)
    seen: dict[fx.Node, fx.Node] = {}
    for node in training.graph.nodes:
        if node.op == "output":
            outputs += [seen[n] for n in node.all_input_nodes if seen[n] not in outputs]
        elif node.op == "placeholder":
            name = training.tensors.get(node.name)
            known = by_name.get(name) if name is not None else next(free, None)
            seen[node] = graph.node_copy(node) if known is None else known
            if known is None and name is not None:
                tensors[seen[node].name] = name
        else:
            new = graph.node_copy(node, seen.__getitem__)
            alike = same.get(_key(new))
            if alike:
                seen[node] = alike.popleft()
                graph.erase_node(new)
            else:
                new.meta = {**node.meta, "training": True}
                seen[node] = new
    end = graph.output(tuple(outputs))
    end.meta = {"eval": frozenset(copies[n].name for n in ends)}
    return replace(exported, graph=graph, tensors=tensors)


_RANDOM = {"dropout", "dropout_", "feature_dropout", "alpha_dropout", "feature_alpha_dropout"}


def _key(node: fx.Node) -> Any:
    """Equal for calls that compute the same, but for what is drawn at random."""
    op, args, kwargs = op_name(node), list(node.args), dict(node.kwargs)
    if op in _RANDOM:
        args, kwargs = args[:1], {}
    elif op == "scaled_dot_product_attention":
        # (query, key, value, attn_mask, dropout_p, is_causal)
        args[4:5] = []  # the share dropped
        kwargs.pop("dropout_p", None)
    elif op == "batch_norm":
        # (input, weight, bias, running_mean, running_var, training, momentum, eps, cudnn_enabled)
        args[5:7] = []  # whether by the batch's own statistics
    return str(node.target), repr(args), repr(sorted(kwargs.items(), key=lambda item: item[0])), within(node)


@dataclass(frozen=True)
class Unreached:
    """Modules that no trace reaches, since the model cannot be run in training mode on the example inputs.

    Attributes:
        modules: Widths of what each may read, by its path.
        why: Why training mode cannot be run.
    """

    modules: Mapping[str, frozenset[int]]
    why: str


def with_training(
    model: nn.Module, exported: Exported, args: Sequence[Any], kwargs: Mapping[str, Any] | None, unread: Idle
) -> Exported | Unreached:
    """The graph of both modes, or what no trace reaches.

    Where training mode can be run but not exported, nothing is unreached: slim models are compared there by values.
    """
    from .copies import duplicate

    try:
        return joined(exported, followed(duplicate(model), args, kwargs))
    except Exception as error:  # for want of targets, or where control flow depends on values
        why = described(error)
        log.info("training mode of %s cannot be followed: %s", type(model).__name__, why)
    if not any(p.is_meta for p in model.parameters()):
        copy = duplicate(model)
        try:
            with torch.no_grad(), in_training(copy), seeded_rng():
                copy(*args, **dict(kwargs or {}))
            return Unreached({}, why)
        except Exception as error:
            why = described(error)
    return Unreached(_widths(model, unread), why)


def _widths(model: nn.Module, unread: Idle) -> dict[str, frozenset[int]]:
    """How many channels modules whose parameters are not read take, as far as that shows in their shapes."""
    parameters = dict(model.named_parameters())
    out = {}
    for path, names in unread.items():
        module = model.get_submodule(path)
        if isinstance(module, nn.Linear):
            widths = {module.in_features}
        elif isinstance(module, _ConvNd):
            widths = {module.in_channels}
        else:
            widths = {n for name in names for n in parameters[name].shape}
        out[path] = frozenset(widths) - {1}
    return out


def pin_unreached(ctx: Context, unreached: Unreached) -> None:
    """Nothing may go of what modules that no trace reaches may read: as wide as their inputs, or so once flattened."""
    widths = [(n, path) for path, module_widths in unreached.modules.items() for n in sorted(module_widths)]
    calls = [node for node in ctx.exported.graph.nodes if node.op == "call_function" and shape_of(node) is not None]
    for node in calls if widths else ():
        shape = shape_of(node) or ()
        for f in ctx.fields(node):
            for d in f.dims if len(f.dims) == 1 else ():
                reader = next((path for n, path in widths if n % shape[d] == 0), None)
                if reader is not None:
                    ctx.labels.stay(
                        f.labels,
                        f"{reader!r} never runs on the example inputs and may take these {shape[d]} channels; training "
                        f"mode cannot be run to see whether it does ({unreached.why})",
                    )
