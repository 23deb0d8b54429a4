"""Ops that mix values along dimensions: sums, means, softmax, pooling, sorting."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from ..export import module_of
from ..labels import Field, Fields
from .elementwise import all_zero, combine
from .movement import equal_parts
from .registry import Context, Result, argument, rule


def mixed(
    ctx: Context, fields: Fields, dims: Iterable[int], *, absent_zeros_count: bool
) -> tuple[Fields, frozenset[int]]:
    """Joins labels along the dimensions that are mixed.

    Args:
        fields: Fields of the operand.
        dims: The dimensions mixed.
        absent_zeros_count: Whether leaving out zeros changes the result (not so for a sum).

    Returns:
        What is left of the fields, with the operand's dimensions, and the dimensions mixed.
    """
    mixed_dims = frozenset(dims)
    out: list[Field] = []
    for f in fields:
        if not f.dims & mixed_dims:
            out.append(f)
        elif f.dims <= mixed_dims and f.zero and not absent_zeros_count:
            continue  # a sum over channels that are truly zero: nothing to join, nothing goes on
        else:
            out += ctx.collapse([f], mixed_dims)
    return tuple(out), mixed_dims


def _reduced_dims(ctx: Context, node: fx.Node) -> list[int]:
    rank = len(ctx.shape(node.args[0]))
    dims = argument(node, "dim")
    if dims is None or dims == []:
        return list(range(rank))
    dims = [dims] if isinstance(dims, int) else dims
    return [int(d) % rank for d in dims]


def _centred(ctx: Context, value: Any, dims: list[int], *, squared: bool) -> fx.Node | None:
    """``x``, where a value is ``x - x.mean(dims)``, or that squared.

    Absent channels are as far from the mean as it is from zero.
    """

    def called(v: object) -> str:
        return str(getattr(v.target, "_opname", "")) if isinstance(v, fx.Node) else ""

    difference: Any = value
    if squared:
        name = called(value)
        difference = value.args[0] if name in ("square", "pow", "mul") else None
        if name != "square" and difference is not None:
            again = 2 if name == "pow" else difference
            difference = difference if value.args[1:] == (again,) else None
    # A variance written by hand. Its centred values are not zero for absent channels, so the mean of their squares
    # alone could not be corrected by the number of channels.
    if called(difference) != "sub":
        return None
    x, mean = difference.args[:2]
    same = called(mean) == "mean" and mean.args[0] is x and _reduced_dims(ctx, mean) == dims
    return x if same and isinstance(x, fx.Node) else None


_NORMS = ("norm", "linalg_norm", "linalg_vector_norm")

_KEEP_ZERO = ("sum", "mean", "amax", "amin", "prod", *_NORMS, "nansum", "var", "std", "nanmean")
"""Reductions whose result is zero where all that they combine is."""


@rule(*_KEEP_ZERO, "any", "all", "logsumexp", "argmax", "argmin", "count_nonzero")
def reduction(ctx: Context, node: fx.Node) -> Result:
    """Values combined along dimensions, which then go."""
    name = node.target._opname  # type: ignore[union-attr]
    dims = _reduced_dims(ctx, node)
    # Sums and norms do not change with absent zeros; means, extremes and products do.
    counts = name not in ("sum", "nansum", *_NORMS)
    source = ctx.fields(node.args[0])
    if name in ("mean", "var", "std") and module_of(node):
        centred = _centred(ctx, node.args[0], dims, squared=name == "mean")
        zero = {f.dims for f in (source if centred is None else ctx.fields(centred)) if f.zero and f.dims <= set(dims)}
        if zero:
            # The module that runs it can be given a statistic that counts the absent channels.
            ctx.counted.add(module_of(node))
            counts = False
            source = tuple(f.with_zero(f.zero or f.dims in zero) for f in source)
    fields, _ = mixed(ctx, source, dims, absent_zeros_count=counts)
    gone = () if argument(node, "keepdim", False) else tuple(dims)
    return tuple(Field(f.labels.squeeze(gone), f.zero and name in _KEEP_ZERO) for f in fields)


@rule("cosine_similarity")
def cosine(ctx: Context, node: fx.Node) -> Result:
    """Sums of products along a dimension: channels that are zero on both sides add nothing to any of them."""
    dim = int(argument(node, "dim", 1))
    a, b = node.args[:2]
    shape = torch.broadcast_shapes(ctx.shape(a), ctx.shape(b))
    fields = combine(ctx, (a, b), shape, all_zero)
    remaining, _ = mixed(ctx, fields, [dim % len(shape)], absent_zeros_count=False)
    return tuple(Field(f.labels.squeeze(dim), False) for f in remaining)


@rule("max", "min", "median", "mode", "kthvalue", "topk", "sort", "var_mean", "std_mean", "aminmax", "cummax", "cummin")
def selection(ctx: Context, node: fx.Node) -> Result:
    """Ops with values and indices (or two statistics) as results; mixed along one dimension, or all."""
    source = node.args[0]
    if len(node.args) > 1 and isinstance(node.args[1], fx.Node):  # max(a, b)
        return combine(ctx, node.args[:2], ctx.shape(node), all_zero)
    several = not hasattr(node.meta["val"], "shape")
    first = node.meta["val"][0] if several else node.meta["val"]
    rank = len(ctx.shape(source))
    name = node.target._opname  # type: ignore[union-attr]
    # Without `dim` these work along the last dimension, and max, min, var_mean and the like over all.
    last = -1 if name in ("topk", "sort", "kthvalue", "mode", "median") else None
    dims = argument(node, "dim", last)
    dims = list(range(rank)) if dims is None else [int(d) % rank for d in ([dims] if isinstance(dims, int) else dims)]
    fields, _ = mixed(ctx, ctx.fields(source), dims, absent_zeros_count=True)
    gone = tuple(dims) if first.dim() < rank else ()
    values = tuple(Field(f.labels.squeeze(gone), f.zero and name in ("max", "min")) for f in fields)
    return (values, tuple(f.with_zero(False) for f in values)) if several else values


ALONG = """
    softmax log_softmax _softmax _log_softmax _safe_softmax cumsum cumprod logcumsumexp argsort glu_backward _fft_c2c
""".split()  # noqa: SIM905


@rule(*ALONG)
def along(ctx: Context, node: fx.Node) -> Result:
    """Values mixed along a dimension that stays."""
    source = node.args[0]
    rank = len(ctx.shape(source))
    dim = argument(node, "dim", -1)
    dims = [int(d) % rank for d in ([dim] if isinstance(dim, int) else dim)]
    fields, _ = mixed(ctx, ctx.fields(source), dims, absent_zeros_count=True)
    keeps = node.target._opname.rstrip("_") in ("cumsum", "cumprod")  # type: ignore[union-attr]
    return tuple(f.with_zero(f.zero and keeps) for f in fields)


SPATIAL = """
    max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d
    adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d max_pool2d_with_indices
    upsample_nearest2d upsample_bilinear2d upsample_bicubic2d upsample_nearest1d upsample_linear1d
    _upsample_nearest_exact2d _upsample_bilinear2d_aa _upsample_bicubic2d_aa upsample_nearest3d
    upsample_trilinear3d grid_sampler grid_sampler_2d
""".split()  # noqa: SIM905


@rule(*SPATIAL)
def spatial(ctx: Context, node: fx.Node) -> Result:
    """Pooling and resizing: positions are mixed, channels are not."""
    name = node.target._opname  # type: ignore[union-attr]
    rank = len(ctx.shape(node.args[0]))
    # Resizing always has (batch, channels, positions ...). Pooling also takes input without a batch, so its spatial
    # dimensions are counted from the end, as many as the digit in its name.
    first = 2 if name.startswith(("upsample", "_upsample", "grid")) else rank - int(next(c for c in name if c in "123"))
    fields, _ = mixed(ctx, ctx.fields(node.args[0]), range(first, rank), absent_zeros_count=True)
    several = not hasattr(node.meta["val"], "shape")
    return (fields, tuple(f.with_zero(False) for f in fields)) if several else fields


@rule("glu")
def glu(ctx: Context, node: fx.Node) -> Result:
    """One half gates the other: the same positions go from both."""
    dim = int(argument(node, "dim", -1)) % len(ctx.shape(node.args[0]))
    return equal_parts(ctx, ctx.fields(node.args[0]), dim, 2)
