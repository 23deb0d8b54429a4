"""Weights that are computed from parameters: which parameter it is, and whether its zeros are zeros of the weight.

A contraction may multiply with what is made of a parameter (weight norm, masks, fake quantization). Masking single
elements of a parameter prunes a model only where a zero of the parameter is a zero of the weight that the model
multiplies with, at a position that is known. A weight norm's direction, the original of a pruned weight and the input
of a fake quantization are such parameters. The original of a standardised or an orthogonal weight is not.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

import torch
from torch import fx

from ..export import op_name, shape_of
from .op_sets import FAKE_QUANTIZATION, KEEP_ZERO, PASSED_ON, RESHAPES
from .registry import MOVEMENT, Axes, Context
from .reshape_blocks import blocks

__all__ = ["weight_of", "zero_sources"]


def weight_of(ctx: Context, value: Any, out_dim: int, in_dim: int) -> tuple[str, int, int] | None:
    """The parameter that a contraction's operand is, or is made from, with its output and input axes.

    Args:
        value: The operand: a parameter, or what was computed from parameters alone (standardised, transposed, a
            part, an expert chosen by index).
        out_dim: The operand's dimension that makes channels.
        in_dim: The operand's dimension that is summed over.
    """
    if not isinstance(value, fx.Node) or ctx.depends_on_inputs(value):
        return None
    name = ctx.tensor_name(value)
    if name is not None:
        return (name, out_dim, in_dim) if name in ctx.exported.trainable else None
    sources = zero_sources(ctx, value)
    found = _largest_source(ctx, sources, out_dim, in_dim) or _ingredient_weight(ctx, value, out_dim, in_dim)
    if found is not None:
        if found[0] in sources:
            ctx.operands.setdefault(found[0], value)
        else:
            ctx.unmaskable.setdefault(found[0], reason_lost(ctx, value, found[0]))
    return found


def _largest_source(
    ctx: Context, sources: Mapping[str, Axes], out_dim: int, in_dim: int
) -> tuple[str, int, int] | None:
    """The largest parameter whose zeros are those of an operand."""
    # The largest is the weight; smaller sources are masks, scales or a norm's gain.
    for name in sorted(sources, key=lambda n: -prod(ctx.exported.shapes[n])):
        out_axis, in_axis = sources[name][out_dim], sources[name][in_dim]
        if out_axis is not None and in_axis is not None and out_axis != in_axis:
            return name, out_axis, in_axis
    return None


def _ingredient_weight(ctx: Context, value: fx.Node, out_dim: int, in_dim: int) -> tuple[str, int, int] | None:
    """The largest parameter that an operand is made from, by labels that it has of its axes, else by its shape."""
    shapes = ctx.exported.shapes
    names = [n for n in _ingredients(ctx, value) if n in ctx.exported.trainable and len(shapes[n]) > 1]
    # Ties are broken by name, so that the choice does not depend on the order of a set.
    names = sorted(names, key=lambda n: (-prod(shapes[n]), n))
    for name in names:
        axes = [_axis_like(ctx, name, value, d) for d in (out_dim, in_dim)]
        if axes[0] is not None and axes[1] is not None and axes[0] != axes[1]:
            return name, axes[0], axes[1]
    rank = len(ctx.shape(value))
    same_shape = (n for n in names if shapes[n] == ctx.shape(value))
    return next(((n, out_dim % rank, in_dim % rank) for n in same_shape), None)


def _axis_like(ctx: Context, name: str, value: fx.Node, dim: int) -> int | None:
    """The axis of a parameter whose labels an operand has along a dimension."""
    here = next((f for f in ctx.fields(value) if f.dims == {dim}), None)
    for axis in range(len(ctx.exported.shapes[name])) if here is not None else ():
        field = ctx.axis_field(ctx.axis_fields(name), axis)
        # One label is enough: a label belongs to one axis, and movement does not invent labels.
        if field is not None and here is not None and bool(torch.isin(here.labels.flatten()[:1], field.labels)):
            return axis
    return None


def _ingredients(ctx: Context, node: fx.Node) -> set[str]:
    name = ctx.tensor_name(node)
    if name is not None:
        return {name}
    return {
        n for source in node.all_input_nodes if not ctx.depends_on_inputs(source) for n in _ingredients(ctx, source)
    }


_NORMS = frozenset({"_weight_norm", "_weight_norm_interface"})
"""``g v / |v|``: a zero of ``v`` is a zero of the result."""

_TRIANGLES = frozenset({"tril", "triu"})


def zero_sources(ctx: Context, value: Any) -> Mapping[str, Axes]:
    """The parameters whose zeros are zeros of a value, each with the axes that the value's dimensions are."""
    if not isinstance(value, fx.Node):
        return {}
    known = ctx.zero_sources.get(value)
    if known is None:
        known = ctx.zero_sources[value] = _zero_sources(ctx, value)
    return known


def _zero_sources(ctx: Context, node: fx.Node) -> Mapping[str, Axes]:
    name = ctx.tensor_name(node)
    if name is not None:
        return {name: tuple(range(len(ctx.shape(node))))} if name in ctx.exported.trainable else {}
    if node.op != "call_function" or not node.args:
        return {}
    op, first = op_name(node), node.args[0]
    # A factor that is zero makes the product zero (weight times mask). A broadcast factor is left out: one element of
    # it decides over many, so there is no element-by-element mask.
    if op in ("mul", "multiply"):
        return {n: axes for a in node.args[:2] if _as_large(a, node) for n, axes in zero_sources(ctx, a).items()}
    if op in ("div", "divide", "true_divide"):
        return zero_sources(ctx, first) if _as_large(first, node) else {}
    if op in _KEEP or op in PASSED_ON or op in KEEP_ZERO:
        return zero_sources(ctx, first)
    # 0 ** p is 0 only for positive p.
    if op == "pow":
        exponent = node.args[1]
        return zero_sources(ctx, first) if isinstance(exponent, int | float) and exponent > 0 else {}
    if op == "masked_fill":
        return zero_sources(ctx, first) if node.args[2] == 0 and _as_large(first, node) else {}
    if op in ("cat", "concat", "concatenate"):
        return {n: axes for a in first for n, axes in zero_sources(ctx, a).items()}  # type: ignore[union-attr]
    return _moved(ctx, node, op)


_KEEP = FAKE_QUANTIZATION | _NORMS | _TRIANGLES


def _moved(ctx: Context, node: fx.Node, op: str) -> Mapping[str, Axes]:
    """Parameters carried by data movement."""
    source = zero_sources(ctx, node.args[0])
    moves = op in MOVEMENT or op in ("index", "index_select")
    if not source or not moves:
        return {}
    # A split returns a list, whose parts `getitem` takes next.
    if shape_of(node) is None:  # a split: its parts are taken from it next
        return source
    return {name: tuple(None if p is None else axes[p] for p in _places(node, op)) for name, axes in source.items()}


def _places(node: fx.Node, op: str) -> Axes:
    """For each dimension of a movement's result the dimension of its operand that it is."""
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
    # An axis keeps its identity through a reshape if its block has one dimension that is larger than 1 on both sides.
    for before, after in blocks(old, new) if op in RESHAPES else ():
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
        if name in zero_sources(ctx, source):
            return f"its zeros would not be zeros of the weight that is computed from it ({op_name(node)} changes them)"
        node = source
    return "its zeros would not be zeros of the weight that is computed from it"
