"""Which parameters' zeros are zeros of a weight that is computed from them (weight norm, masks, fake quantization).

Masking single elements of a parameter prunes a model only where a zero of the parameter is a zero of the weight that
the model multiplies with, at a position that is known. A weight norm's direction, the original of a pruned weight and
the input of a fake quantization are such parameters. The original of a standardised or an orthogonal weight is not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from .export import op_name, shape_of

if TYPE_CHECKING:
    from .rules import Context

__all__ = ["FAKE_QUANTIZATION", "carried", "computation", "computed", "reason_lost"]

Axes = tuple[int | None, ...]
"""For each dimension of a value the axis of the parameter that it is; ``None`` where it is no axis alone."""

FAKE_QUANTIZATION = frozenset(
    {
        "_fused_moving_avg_obs_fq_helper",
        "fake_quantize_per_channel_affine",
        "fake_quantize_per_channel_affine_cachemask",
        "fake_quantize_per_tensor_affine",
        "fake_quantize_per_tensor_affine_cachemask",
        "fused_moving_avg_obs_fake_quant",
    }
)
"""Zero is a point of every affine grid, so these keep zeros."""

_NORMS = frozenset({"_weight_norm", "_weight_norm_interface"})
"""``g v / |v|``: a zero of ``v`` is a zero of the result."""

_TRIANGLES = frozenset({"tril", "triu"})


def carried(ctx: Context, value: Any) -> Mapping[str, Axes]:
    """The parameters whose zeros are zeros of a value, each with the axes that the value's dimensions are."""
    if not isinstance(value, fx.Node):
        return {}
    known = ctx.carried.get(value)
    if known is None:
        known = ctx.carried[value] = _carried(ctx, value)
    return known


def _carried(ctx: Context, node: fx.Node) -> Mapping[str, Axes]:
    from .rules import elementwise, movement

    name = ctx.tensor_name(node)
    if name is not None:
        return {name: tuple(range(len(ctx.shape(node))))} if name in ctx.exported.trainable else {}
    if node.op != "call_function" or not node.args:
        return {}
    op, first = op_name(node), node.args[0]
    if op in ("mul", "multiply"):
        return {n: axes for a in node.args[:2] if _as_large(a, node) for n, axes in carried(ctx, a).items()}
    if op in ("div", "divide", "true_divide"):
        return carried(ctx, first) if _as_large(first, node) else {}
    if op in _KEEP or op in movement.PASSED_ON or op in elementwise.KEEP_ZERO:
        return carried(ctx, first)
    if op == "pow":
        exponent = node.args[1]
        return carried(ctx, first) if isinstance(exponent, int | float) and exponent > 0 else {}
    if op == "masked_fill":
        return carried(ctx, first) if node.args[2] == 0 and _as_large(first, node) else {}
    if op in ("cat", "concat", "concatenate"):
        return {n: axes for a in first for n, axes in carried(ctx, a).items()}  # type: ignore[union-attr]
    return _moved(ctx, node, op)


_KEEP = FAKE_QUANTIZATION | _NORMS | _TRIANGLES

_RESHAPES = frozenset("reshape view _unsafe_view flatten unflatten squeeze unsqueeze reshape_as view_as ravel".split())  # noqa: SIM905


def _moved(ctx: Context, node: fx.Node, op: str) -> Mapping[str, Axes]:
    """Parameters carried by data movement."""
    from .rules import RULES, movement

    source = carried(ctx, node.args[0])
    moves = getattr(RULES.get(op), "__module__", "") == movement.__name__ or op in ("index", "index_select")
    if not source or not moves:
        return {}
    if shape_of(node) is None:  # a split: its parts are taken from it next
        return source
    return {name: tuple(None if p is None else axes[p] for p in _places(node, op)) for name, axes in source.items()}


def _places(node: fx.Node, op: str) -> Axes:
    """For each dimension of a movement's result the dimension of its operand that it is."""
    from .rules.movement import blocks

    new = shape_of(node) or ()
    old = shape_of(node.args[0])
    if old is None:  # a part of a split has all of its dimensions, one of what is unbound has not
        return tuple(range(len(new))) if op_name(node.args[0]) != "unbind" else (None,) * len(new)  # type: ignore[arg-type]
    rank = len(old)
    if op in ("permute", "permute_copy"):
        return tuple(int(d) % rank for d in node.args[1])  # type: ignore[union-attr, arg-type]
    if op in ("transpose", "transpose_copy", "swapaxes", "swapdims"):
        order = list(range(rank))
        a, b = (int(d) % rank for d in node.args[1:3])  # type: ignore[arg-type]
        order[a], order[b] = order[b], order[a]
        return tuple(order)
    if op in ("t", "numpy_T", "mT", "adjoint", "matrix_H") and rank == 2:
        return (1, 0)
    if op in ("slice", "narrow"):
        return tuple(range(rank))
    places: list[int | None] = [None] * len(new)
    for before, after in blocks(old, new) if op in _RESHAPES else ():
        wide_before, wide_after = [d for d in before if old[d] > 1], [d for d in after if new[d] > 1]
        if len(wide_before) == len(wide_after) == 1:
            places[wide_after[0]] = wide_before[0]
    return tuple(places)


def _as_large(value: Any, node: fx.Node) -> bool:
    """Whether an operand is not broadcast, so that one element of it is one of the result."""
    return isinstance(value, fx.Node) and shape_of(value) == shape_of(node)


def reason_lost(ctx: Context, value: fx.Node, name: str) -> str:
    """Why a parameter's zeros are not zeros of a value: the call that loses them."""
    node: Any = value
    while isinstance(node, fx.Node) and node.args:
        source = node.args[0]
        if name in carried(ctx, source):
            return f"its zeros would not be zeros of the weight that is computed from it ({op_name(node)} changes them)"
        node = source
    return "its zeros would not be zeros of the weight that is computed from it"


def computed(graph: fx.Graph, tensors: Callable[[str], Tensor]) -> Tensor:
    """Runs the graph of a weight.

    Args:
        graph: As :func:`computation` makes it.
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


def computation(ctx: Context, value: fx.Node) -> fx.Graph:
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
