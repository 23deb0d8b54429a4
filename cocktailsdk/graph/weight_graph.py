"""The graph that computes a weight from its parameter (weight norm, masks, fake quantization), to run it by itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from .export import op_name
from .rules import Context

__all__ = ["run_weight_graph", "weight_graph"]


def run_weight_graph(graph: fx.Graph, tensors: Callable[[str], Tensor]) -> Tensor:
    """Runs the graph of a weight.

    Args:
        graph: As :func:`weight_graph` makes it.
        tensors: A parameter or buffer by its name; none is changed.
    """
    values: dict[fx.Node, Any] = {}
    *nodes, end = graph.nodes
    with torch.no_grad():
        for node in nodes:
            if node.op == "placeholder":
                # a copy, since observers of fake quantization write into their buffers
                values[node] = tensors(node.meta["tensor"]).detach().clone()
            elif not op_name(node).startswith("_assert"):
                args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
                values[node] = node.target(*args, **kwargs)
    result: Tensor = values[end.args[0]]
    return result


def weight_graph(ctx: Context, value: fx.Node) -> fx.Graph:
    """The graph that computes a value from parameters and buffers, which are its placeholders, by their names."""
    needed: set[fx.Node] = set()
    pending = [value]
    while pending:
        node = pending.pop()
        if node not in needed:
            needed.add(node)
            pending += node.all_input_nodes
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in ctx.exported.graph.nodes:
        if node in needed:
            copies[node] = graph.node_copy(node, copies.__getitem__)
            copies[node].meta = {"tensor": ctx.tensor_name(node)}
    graph.output(copies[value])
    return graph
