"""Data movement: executed on the labels, not modelled. What goes by index or in windows is in placement.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from jaxtyping import Int64
from torch import Tensor, fx

from ..export import module_of
from ..labels import MUST_STAY, Field, Fields, compact, spread
from .elementwise import unify
from .op_sets import PASSED_ON, RESHAPES
from .registry import Context, Result, argument, rule
from .reshape_blocks import blocks

LabelTensor = Int64[Tensor, "..."]

movement_rule = partial(rule, moves=True)


def moved(fields: Fields, fn: Callable[[LabelTensor], LabelTensor]) -> Fields:
    """Runs the same movement on every field's labels."""
    return tuple(f.with_labels(fn(f.labels)) for f in fields)


@movement_rule(*PASSED_ON)
def same(ctx: Context, node: fx.Node) -> Result:
    """Values, or a cast of them, passed on as they are."""
    return ctx.fields(node.args[0])


def reshaped(labels: LabelTensor, old: Sequence[int], new: Sequence[int]) -> LabelTensor:
    """Reshapes a field's labels, keeping size 1 wherever a block of dimensions does not vary.

    Args:
        labels: Compact labels of a tensor of shape ``old``.
        old: The tensor's shape.
        new: The shape it gets.
    """
    # Reshaping labels of full size would be right too, but a field of one dimension on a large tensor would take as
    # much memory as the tensor. Blocks in which nothing varies keep size 1.
    before, after = list(labels.shape), [1] * len(new)
    for block_in, block_out in blocks(old, new):
        if any(labels.shape[d] > 1 for d in block_in):
            for d in block_in:
                before[d] = old[d]
            for d in block_out:
                after[d] = new[d]
    return compact(labels.expand(before).reshape(after))


@movement_rule(*RESHAPES)
def reshape(ctx: Context, node: fx.Node) -> Result:
    """Any change of shape that keeps the order of elements."""
    old, new = ctx.shape(node.args[0]), ctx.shape(node)
    out = moved(ctx.fields(node.args[0]), lambda labels: reshaped(labels, old, new))
    for f in out:
        # A flat axis is seen as rows and columns from here on (heads and channels of a head). Code can only express
        # that whole rows or whole columns go, which is settled at the end.
        if len(f.dims) > 1:
            ctx.rectangles.append(f.labels)
    return out


@movement_rule("permute", "permute_copy")
def permute(ctx: Context, node: fx.Node) -> Result:
    """Dimensions in another order."""
    dims = argument(node, "dims")
    return moved(ctx.fields(node.args[0]), lambda labels: labels.permute(dims))


@movement_rule("transpose", "transpose_copy", "swapaxes", "swapdims")
def transpose(ctx: Context, node: fx.Node) -> Result:
    """Two dimensions change places."""
    a, b = node.args[1], node.args[2]
    return moved(ctx.fields(node.args[0]), lambda labels: labels.transpose(a, b))  # type: ignore[arg-type]


@movement_rule("t", "numpy_T", "mT", "adjoint", "matrix_H")
def matrix_transpose(ctx: Context, node: fx.Node) -> Result:
    """A matrix transposed."""
    return moved(ctx.fields(node.args[0]), lambda labels: labels.transpose(-2, -1) if labels.dim() > 1 else labels)


@movement_rule("movedim", "moveaxis")
def movedim(ctx: Context, node: fx.Node) -> Result:
    """Dimensions moved to other places."""
    source, target = node.args[1], node.args[2]
    return moved(ctx.fields(node.args[0]), lambda labels: labels.movedim(source, target))  # type: ignore[arg-type]


@movement_rule("expand", "expand_as", "broadcast_to", "expand_copy")
def expand(ctx: Context, node: fx.Node) -> Result:
    """New dimensions in front; along a repeated one nothing varies, unless it is as long as another tensor's."""
    old, new = ctx.shape(node.args[0]), ctx.shape(node)
    extra = len(new) - len(old)
    own = moved(ctx.fields(node.args[0]), lambda labels: labels[(None,) * extra])
    if node.target._opname != "expand_as":  # type: ignore[union-attr]
        return own
    repeated = {d for d in range(len(new)) if d < extra or old[d - extra] != new[d]}
    return own + tuple(f.with_zero(False) for f in ctx.fields(node.args[1]) if f.dims <= repeated)


@movement_rule("select", "select_copy")
def select(ctx: Context, node: fx.Node) -> Result:
    """One position of a dimension."""
    dim = int(node.args[1]) % len(ctx.shape(node.args[0]))  # type: ignore[arg-type]
    # Positions are named by number, so nothing may be removed along the dimension.
    return moved(ctx.collapse(ctx.fields(node.args[0]), {dim}), lambda labels: labels.select(dim, 0))


@movement_rule("unbind", "unbind_copy")
def unbind(ctx: Context, node: fx.Node) -> Result:
    """Every position of a dimension, apart."""
    shape = ctx.shape(node.args[0])
    dim = int(argument(node, "dim", 0)) % len(shape)
    part = moved(ctx.collapse(ctx.fields(node.args[0]), {dim}), lambda labels: labels.select(dim, 0))
    return (part,) * shape[dim]


@movement_rule("slice", "narrow", "slice_copy")
def slice_(ctx: Context, node: fx.Node) -> Result:
    """A run of positions; the module that takes it is given the bounds of what is left."""
    old, new = ctx.shape(node.args[0]), ctx.shape(node)
    dim = next((d for d in range(len(old)) if old[d] != new[d]), None)
    if dim is None:
        return ctx.fields(node.args[0])
    out = []
    for f in ctx.fields(node.args[0]):
        if dim not in f.dims:
            out.append(f)
            continue
        # The op itself runs on the labels: its arguments mean positions, whatever the values are.
        labels = node.target(f.labels, *node.args[1:], **node.kwargs)  # type: ignore[operator]
        # A part of one channel cannot become narrower, and one that is gone would be an empty tensor.
        if labels.numel() == 1:
            ctx.labels.stay(labels)
        else:
            ctx.parts.append(labels)
            out.append(f.with_labels(labels))
    return tuple(out)


SPLITS = """
    chunk split split_with_sizes tensor_split split_copy split_with_sizes_copy unsafe_split unsafe_chunk
""".split()  # noqa: SIM905


@movement_rule(*SPLITS)
def split(ctx: Context, node: fx.Node) -> Result:
    """Parts along a dimension. Equal parts must lose the same positions; unequal ones get sizes of their own."""
    shape = ctx.shape(node.args[0])
    dim = int(argument(node, "dim", 0)) % len(shape)
    sizes = [int(v.shape[dim]) for v in node.meta["val"]]
    fields = ctx.fields(node.args[0])
    # `split` with one size, and `chunk`, can only make equal parts, so equal parts must stay equal. Unequal sizes are
    # in the code as a list, which the slim module gets with other numbers.
    if len(set(sizes)) > 1:
        return tuple(_run(ctx, fields, dim, sum(sizes[:i]), n) for i, n in enumerate(sizes))
    return (equal_parts(ctx, fields, dim, len(sizes)),) * len(sizes)


def equal_parts(ctx: Context, fields: Fields, dim: int, count: int) -> Fields:
    """Fields of the first of several parts, all of which lose the same positions."""
    out = []
    for f in fields:
        if dim in f.dims:
            parts = f.labels.unflatten(dim, (count, -1))
            first = parts.select(dim, 0)
            ctx.labels.join(parts, first.unsqueeze(dim))
            if first.numel() == 1:
                ctx.labels.stay(first)
                continue
            f = f.with_labels(first)
        out.append(f)
    return tuple(out)


def _run(ctx: Context, fields: Fields, dim: int, start: int, length: int) -> Fields:
    out = []
    for f in fields:
        part = f.labels.narrow(dim, start, length) if dim in f.dims else f.labels
        if part.numel() == 1:
            ctx.labels.stay(part)
            continue
        if dim in f.dims:
            ctx.parts.append(part)
        out.append(f.with_labels(part))
    return tuple(out)


@movement_rule("new_empty", "new_empty_strided")
def unset(ctx: Context, node: fx.Node) -> Result:
    """A tensor of a shape that is a number, whose values are not known: it has no labels."""
    return ()


@movement_rule("zeros", "ones", "full", "new_zeros", "new_ones", "new_full")
def uniform(ctx: Context, node: fx.Node) -> Result:
    """A tensor of one value everywhere, which can be of any size: what it meets decides."""
    name, shape = str(node.target._opname), ctx.shape(node)  # type: ignore[union-attr]
    value = argument(node, "fill_value") if name.endswith("full") else float(name.endswith("ones"))
    zero = isinstance(value, (int, float)) and value == 0
    out = []
    # Dimension 0 is left out: it is the batch, which has no channels.
    for d, n in enumerate(shape):
        # Fresh labels follow whatever channels the tensor meets first.
        if d > 0 and n > 1:
            view = [1] * len(shape)
            view[d] = n
            out.append(Field(ctx.labels.fresh(n).view(view), zero))
    return tuple(out)


CHECKS = """
    _assert_tensor_metadata _assert_async _assert_scalar sym_constrain_range sym_constrain_range_for_size sym_size
""".split()  # noqa: SIM905


@movement_rule(*CHECKS)
def checks(ctx: Context, node: fx.Node) -> Result:
    """Assertions and sizes say nothing of channels."""
    return ()


@movement_rule("getitem")
def getitem(ctx: Context, node: fx.Node) -> Result:
    """One of several results."""
    several = ctx.env.get(node.args[0], ())  # type: ignore[arg-type]
    if several and not isinstance(several[0], Field):
        return several[node.args[1]]  # type: ignore[index]
    return several if node.args[1] == 0 else ()


@movement_rule("cat", "concat", "concatenate")
def cat(ctx: Context, node: fx.Node) -> Result:
    """Tensors one after the other."""
    # torch.cat accepts empty tensors of shape (0,) among others of any rank, and ignores them.
    parts = [p for p in node.args[0] if ctx.shape(p) != (0,)]  # type: ignore[union-attr]
    dim = int(argument(node, "dim", 0)) % len(ctx.shape(node))
    return concatenated(ctx, [ctx.fields(p) for p in parts], [ctx.shape(p) for p in parts], dim)


@movement_rule("stack")
def stack(ctx: Context, node: fx.Node) -> Result:
    """Tensors along a new dimension."""
    dim = int(argument(node, "dim", 0)) % len(ctx.shape(node))
    parts = [moved(ctx.fields(p), lambda labels: labels.unsqueeze(dim)) for p in node.args[0]]  # type: ignore[union-attr]
    shapes = [(*shape[:dim], 1, *shape[dim:]) for shape in map(ctx.shape, node.args[0])]  # type: ignore[arg-type]
    return concatenated(ctx, parts, shapes, dim)


def concatenated(ctx: Context, parts: Sequence[Fields], shapes: Sequence[tuple[int, ...]], dim: int) -> Fields:
    """Fields of a concatenation: one along ``dim``, and those across it that every part shares."""
    out: list[Field] = []
    along: list[Field | None] = []
    across: list[list[Field]] = []
    for fields in parts:
        varying = [f for f in fields if dim in f.dims]
        for extra in varying[1:]:  # two families along one axis: keep the first, the other stays
            ctx.labels.stay(extra.labels)
        along.append(varying[0] if varying else None)
        across.append([f for f in fields if dim not in f.dims])
    # A part that has one field more across than any part with a field along `dim` varies along it after all (whole
    # heads before a part whose channels have labels of their own): that field is taken as the one along `dim`.
    most = max((len(a) for a, f in zip(across, along, strict=True) if f is not None), default=0)
    for i, present in enumerate(across):  # whole heads, say, before a part of which each channel has its own label
        if along[i] is None and len(present) == most + 1 and any(f is not None for f in along):
            along[i] = present.pop()
    # Across, the parts meet as the operands of a sum do.
    flat = [tuple(1 if d == dim else n for d, n in enumerate(shape)) for shape in shapes]
    for row in unify(ctx, list(zip(flat, map(tuple, across), strict=True)), flat[0]):
        present = [f for f in row if f is not None]
        if len(present) == len(row):
            out.append(present[0].with_zero(all(f.zero for f in present)))
        else:
            ctx.labels.stay_all(present, ctx.labels.because + " (joined with channels that stay)")
    if any(a is not None for a in along):
        dims = {d for a in along if a is not None for d in a.dims} | {dim}
        labels = []
        for a, shape in zip(along, shapes, strict=True):
            # A part without labels (a class token, a constant) keeps all of its positions.
            own = a.labels if a is not None else torch.full([1] * len(shape), MUST_STAY)
            labels.append(spread(own, shape, dims))
        joined = torch.cat(labels, dim)
        out.append(Field(joined, all(a is None or a.zero for a in along)))
        if len(dims) > 1:
            ctx.rectangles.append(joined)
    return tuple(out)


@movement_rule("pad", "constant_pad_nd")
def pad(ctx: Context, node: fx.Node) -> Result:
    """Padding. Zeros along channels get free labels where the module that pads can be rewritten."""
    amounts = list(argument(node, "pad"))
    mode = argument(node, "mode", "constant")
    value = argument(node, "value", 0) or 0
    shape = ctx.shape(node.args[0])
    # Padded channels can go only where they are zeros and the module is nothing but slices and pads, so that its graph
    # can be replaced by one with other amounts.
    free = mode == "constant" and value == 0 and rewritable(ctx, module_of(node))
    out = []
    for f in ctx.fields(node.args[0]):
        labels: LabelTensor | None = f.labels
        for i in range(0, len(amounts), 2):
            # `pad` lists amounts in pairs from the last dimension to the first.
            dim = len(shape) - 1 - i // 2
            before, after = amounts[i], amounts[i + 1]
            if labels is None or dim not in f.dims or (before, after) == (0, 0):
                continue
            if mode != "constant" or before < 0 or after < 0:
                collapsed = ctx.labels.collapse(f.with_labels(labels), [dim])
                # Reflected and cropped positions depend on the width as a whole.
                labels = None if collapsed is None else collapsed.labels
                continue
            parts = [labels]
            for count, first in ((before, True), (after, False)):
                size = list(labels.shape)
                size[dim] = count
                new = ctx.labels.fresh(count) if free else torch.full((count,), MUST_STAY)
                view = [1] * len(shape)
                view[dim] = count
                new = new.view(view).expand(size)
                parts = [new, *parts] if first else [*parts, new]
            labels = torch.cat(parts, dim)
            if free:
                ctx.pads.add(module_of(node))
        if labels is not None:
            out.append(Field(labels, f.zero and value == 0))
    return tuple(out)


REWRITABLE = {"pad", "constant_pad_nd", "slice", "alias", "clone", "contiguous"}


def rewritable(ctx: Context, module: str) -> bool:
    """Whether a module does nothing but slice and pad one tensor, so that its graph can stand for it."""
    nodes = ctx.nodes_of(module)
    # The model itself ("") is never replaced by a graph.
    if not module or any(n.target._opname not in REWRITABLE for n in nodes):  # type: ignore[union-attr]
        return False
    owned = any(name.rpartition(".")[0] == module for name in ctx.exported.shapes)
    inputs = {a for n in nodes for a in n.all_input_nodes if a not in set(nodes)}
    # A module that owns tensors, calls children or takes several inputs does more than the graph would.
    return not owned and not ctx.runs_children(module) and len(inputs) == 1
