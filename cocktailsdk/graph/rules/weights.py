"""Which parameter a contraction multiplies with, where its operand is a parameter or computed from some."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

import torch
from torch import fx

from .registry import Axes, Context
from .zero_sources import reason_lost, zero_sources

__all__ = ["weight_of"]


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
