"""Positions chosen, copied or put elsewhere: by index, by repetition, in windows, by a constant pattern."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import fx

from ..labels import Field, Fields, compact
from .movement import moved
from .registry import Context, Result, argument, rule


@rule("triu", "tril")
def triangle(ctx: Context, node: fx.Node) -> Result:
    """Zeros on one side of the diagonal: rows and columns are told apart by where they are."""
    source = node.args[0]
    rank = len(ctx.shape(source))
    return ctx.collapse(ctx.fields(source), {rank - 2, rank - 1})


@rule("scatter", "scatter_add", "scatter_reduce", "index_add", "index_copy", "index_fill", "masked_scatter")
def scattered(ctx: Context, node: fx.Node) -> Result:
    """Values put where numbers say: nothing is known of what lies where."""
    for source in node.all_input_nodes:
        ctx.labels.stay_all(ctx.fields(source))
    return ()


@rule("index", "index_select", "gather", "take_along_dim", "masked_select", "index_put", "take")
def index(ctx: Context, node: fx.Node) -> Result:
    """Positions chosen by values: a field passes through if it does not vary along the gathered dimensions."""
    source = node.args[0]
    shape = ctx.shape(source)
    name = node.target._opname  # type: ignore[union-attr]
    if name == "index":
        indices = list(node.args[1])  # type: ignore[arg-type]
        chosen = [d for d, i in enumerate(indices) if i is not None]
        ranks = {len(ctx.shape(indices[d])) for d in chosen}
        booleans = any(indices[d].meta["val"].dtype in (torch.bool, torch.uint8) for d in chosen)
        # Indices with a slice between them move the indexed dimensions to the front, and a mask makes a size that
        # depends on values. Neither is followed.
        together = chosen == list(range(chosen[0], chosen[-1] + 1))
        if booleans or not together:
            ctx.labels.stay_all(ctx.fields(source))
            return ()
        # The indexed dimensions become those of the index, wherever the first of them was.
        start, stop, new = chosen[0], chosen[-1] + 1, (1,) * max(ranks)
        fields = ctx.collapse(ctx.fields(source), chosen)
        return moved(fields, lambda labels: labels.reshape((*labels.shape[:start], *new, *labels.shape[stop:])))
    if name == "index_select":
        return ctx.collapse(ctx.fields(source), {int(node.args[1]) % len(shape)})  # type: ignore[arg-type]
    for operand in node.all_input_nodes:
        ctx.labels.stay_all(ctx.fields(operand))
    return ()


@rule("embedding")
def embedding(ctx: Context, node: fx.Node) -> Result:
    """Rows of a table chosen by index: its columns are the channels."""
    table = ctx.fields(node.args[0])
    # One row for each index: the result has the index's dimensions and then the columns.
    rank = len(ctx.shape(node)) - 1
    out = []
    for f in table:
        if 0 in f.dims:
            ctx.labels.stay(f.labels, "rows of an embedding are chosen by index")
        else:
            out.append(f.with_labels(f.labels.view((1,) * rank + (f.labels.shape[1],))))
    name = ctx.tensor_name(node.args[0])
    if name is not None:
        ctx.tables.add(name)
    return tuple(out)


@rule("repeat", "tile")
def repeat(ctx: Context, node: fx.Node) -> Result:
    """Copies one after the other along dimensions: a channel goes with its copies."""
    times = list(node.args[1])  # type: ignore[arg-type]
    rank = len(ctx.shape(node))
    # As torch.Tensor.repeat: more factors than dimensions add dimensions in front.
    times = [1] * (rank - len(times)) + times
    out = []
    for f in ctx.fields(node.args[0]):
        labels = f.labels[(None,) * (rank - f.labels.dim())]
        out.append(f.with_labels(labels.repeat([t if labels.shape[d] > 1 else 1 for d, t in enumerate(times)])))
    return tuple(out)


@rule("roll", "flip", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "unfold", "rot90")
def executed(ctx: Context, node: fx.Node) -> Result:
    """Any other movement whose arguments are constants: run on labels of full size."""
    shape = ctx.shape(node.args[0])
    out = []
    for f in ctx.fields(node.args[0]):
        # Windows and shuffles mix dimensions, so compact labels would be moved wrongly.
        full = f.labels.expand(shape).contiguous()
        if _shifts_channels(node, f):
            ctx.labels.stay(f.labels)
            continue
        if node.target._opname == "channel_shuffle" and 1 in f.dims:  # type: ignore[union-attr]
            rows = f.labels.unflatten(1, (int(node.args[1]), -1))  # type: ignore[arg-type]
            ctx.labels.join(rows, rows.narrow(1, 0, 1))  # every row of the shuffle loses the same positions
        result = compact(node.target(full, *node.args[1:], **node.kwargs))  # type: ignore[operator]
        g = Field(result, f.zero)
        if len(g.dims) > 1:
            ctx.rectangles.append(result)
        out.append(g)
    return tuple(out)


@rule("repeat_interleave")
def repeat_interleave(ctx: Context, node: fx.Node) -> Result:
    """Each position several times, one after the other: copies of a channel go with it."""
    dim, times = argument(node, "dim"), node.args[1] if len(node.args) > 1 else None
    if dim is None or not isinstance(times, int):
        ctx.labels.stay_all(ctx.fields(node.args[0]))
        return ()
    d = int(dim) % len(ctx.shape(node.args[0]))
    return moved(ctx.fields(node.args[0]), lambda t: t.repeat_interleave(times, d) if t.shape[d] > 1 else t)


@rule("im2col")
def im2col(ctx: Context, node: fx.Node) -> Result:
    """Windows as columns: each channel once for every position of the kernel."""
    kernel = prod(argument(node, "kernel_size"))
    out = []
    for f in _along_channels(ctx, node.args[0]):
        # im2col lists channel by channel, each with all positions of its kernel, along dimension 1.
        labels = f.labels.flatten().repeat_interleave(kernel).view(1, -1, 1)
        out.append(f.with_labels(labels))
    return tuple(out)


@rule("col2im")
def col2im(ctx: Context, node: fx.Node) -> Result:
    """Columns summed back into an image: the positions of a kernel go together."""
    kernel = prod(argument(node, "kernel_size"))
    out = []
    for f in _along_channels(ctx, node.args[0]):
        rows = f.labels.reshape(-1, kernel)
        ctx.labels.join(rows, rows[:, :1])
        out.append(f.with_labels(rows[:, :1].reshape(1, -1, 1, 1)))
    return tuple(out)


def _along_channels(ctx: Context, value: Any) -> Fields:
    """A value's fields without all that varies along other dimensions than the channels'."""
    return ctx.collapse(ctx.fields(value), [d for d in range(len(ctx.shape(value))) if d != 1])


def _shifts_channels(node: fx.Node, f: Field) -> bool:
    """Rolling or flipping channels by a number of positions cannot be followed once some are gone."""
    name = node.target._opname  # type: ignore[union-attr]
    rank = f.labels.dim()
    if name == "roll":
        dims = argument(node, "dims", []) or range(rank)
        return any(int(d) % rank in f.dims for d in dims)
    if name == "flip":
        return any(int(d) % rank in f.dims for d in argument(node, "dims"))
    if name == "rot90":
        return any(int(d) % rank in f.dims for d in argument(node, "dims", [0, 1]))
    if name == "unfold":
        return int(argument(node, "dimension")) % rank in f.dims
    return False
