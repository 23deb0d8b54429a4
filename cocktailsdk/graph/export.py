"""A model as an fx graph of ATen calls, with shapes on every node."""

from __future__ import annotations

import io
import logging
import textwrap
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import InputKind

from ..errors import ExportFailed

__all__ = ["Exported", "evaluating", "export", "module_of", "shape_of"]


@dataclass(frozen=True)
class Exported:
    """An exported model.

    Attributes:
        graph: Nodes are ATen calls; ``meta["val"]`` holds fake tensors.
        tensors: For each placeholder that is a parameter or buffer the name it has in the model.
            A tied parameter has the first of its names everywhere.
        shapes: The shape of each of these tensors.
        trainable: Names of those that are parameters.
    """

    graph: fx.Graph
    tensors: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]
    trainable: frozenset[str]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Every module in eval mode, and back as it was."""
    was = [(m, m.training) for m in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for m, training in was:
            m.training = training


def export(model: nn.Module, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> Exported:
    """Exports a model in eval mode; the model is left as it was.

    Raises:
        ExportFailed: If ``torch.export`` cannot follow it on these inputs.
    """
    if not args and not kwargs:
        raise ExportFailed(
            f"{type(model).__name__}: the graph is found by running the model, but no example inputs were given. "
            "Pass example_inputs=(x,) or example_kwargs={...}."
        )
    first: dict[int, str] = {}
    canonical: dict[str, str] = {}
    for name, tensor in [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]:
        canonical[name] = first.setdefault(id(tensor), name)
    with evaluating(model), warnings.catch_warnings(), _quiet(), torch.no_grad():
        warnings.simplefilter("ignore")
        try:
            program = torch.export.export(model, tuple(args), dict(kwargs or {}), strict=False)
        except Exception as error:
            lines = str(error).strip().splitlines() or ["no message"]
            reason = textwrap.shorten(lines[0], 200, placeholder=" …")
            raise ExportFailed(
                f"{type(model).__name__} could not be exported on the example inputs "
                f"({type(error).__name__}: {reason}). "
                "Check that the model runs on these inputs, and that its control flow does not depend on tensor values."
            ) from error
    tensors = {}
    for spec in program.graph_signature.input_specs:
        if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER) and spec.target is not None:
            tensors[spec.arg.name] = canonical.get(spec.target, spec.target)
    parameters = dict(model.named_parameters())
    shapes = {name: tuple(t.shape) for name, t in [*parameters.items(), *model.named_buffers()]}
    return Exported(program.graph, tensors, shapes, frozenset(parameters))


def shape_of(node: Any) -> tuple[int, ...] | None:
    """A node's shape, ``None`` where it is no tensor."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else node
    return tuple(int(s) for s in value.shape) if isinstance(value, Tensor) else None


def module_of(node: fx.Node) -> str:
    """Path of the innermost module that ran a node (``""`` for the model itself)."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path = str(list(stack.values())[-1][0])
    return path.split("@")[0]  # a module called again is 'name@1'


@contextmanager
def _quiet() -> Iterator[None]:
    """Export's own log lines (guards it could not make, say) and the graphs that it prints mean nothing to users."""
    logger = logging.getLogger("torch")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
