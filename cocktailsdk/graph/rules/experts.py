"""Mixture of experts: products with a stack of matrices, each for its own rows."""

from __future__ import annotations

from math import prod

from torch import fx

from ..export import module_of
from .contraction import consume
from .registry import Context, Product, Result, WeightUse, rule
from .weights import weight_of


@rule("grouped_mm", "_grouped_mm", "grouped_mm_fallback")
def grouped_mm(ctx: Context, node: fx.Node) -> Result:
    """``y[t, n] = sum_k x[t, k] w[expert of t, k, n]``: the same channels of every expert go, the experts stay."""
    x, w = node.args[:2]
    macs = prod(ctx.shape(node)) * ctx.shape(x)[-1]
    if len(ctx.shape(x)) != 2 or len(ctx.shape(w)) != 3:  # the other forms of this op, in which rows are contracted
        ctx.labels.stay_all((*ctx.fields(x), *ctx.fields(w)))
        ctx.products.append(Product(node, module_of(node), None, macs, ()))
        return ()
    weight = weight_of(ctx, w, 2, 1)
    ctx.products.append(Product(node, module_of(node), None if weight is None else weight[0], macs, ()))
    if weight is not None:
        ctx.uses.setdefault(weight[0], WeightUse(weight[0], module_of(node), "matmul", weight[1], weight[2], 1))
    passing, made = consume(ctx, ctx.collapse(ctx.fields(x), {0}), ctx.collapse(ctx.fields(w), {0}), 1, 1)
    out = [f.with_labels(f.labels.reshape(1, -1)) for f in made if f.dims == {2}]
    return (*out, *passing)
