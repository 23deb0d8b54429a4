"""Mixture of experts: products with a stack of matrices, each for its own rows."""

from __future__ import annotations

from math import prod

from torch import fx

from .contraction import consume, remember
from .registry import Context, Result, rule


@rule("grouped_mm", "_grouped_mm", "grouped_mm_fallback")
def grouped_mm(ctx: Context, node: fx.Node) -> Result:
    """``y[t, n] = sum_k x[t, k] w[expert of t, k, n]``: the same channels of every expert go, the experts stay."""
    x, w = node.args[:2]
    macs = prod(ctx.shape(node)) * ctx.shape(x)[-1]
    if len(ctx.shape(x)) != 2 or len(ctx.shape(w)) != 3:  # the other forms of this op, in which rows are contracted
        ctx.labels.stay_all((*ctx.fields(x), *ctx.fields(w)))
        remember(ctx, node, None, "matmul", (2, 1), macs, ())
        return ()
    remember(ctx, node, w, "matmul", (2, 1), macs, ())
    passing, made = consume(ctx, ctx.collapse(ctx.fields(x), {0}), ctx.collapse(ctx.fields(w), {0}), 1, 1)
    out = [f.with_labels(f.labels.reshape(1, -1)) for f in made if f.dims == {2}]
    return (*out, *passing)
