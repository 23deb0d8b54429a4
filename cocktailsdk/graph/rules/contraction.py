"""Products summed over a dimension: linear layers, convolutions, matrix products, attention."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet
from math import prod
from typing import Any

from jaxtyping import Int64
from torch import Tensor, fx

from ..export import module_of
from ..labels import Field, Fields
from .elementwise import all_zero, any_zero, unified
from .registry import Context, Product, Result, WeightUse, argument, rule
from .weights import weight_of


def consume(
    ctx: Context, left: Fields, right: Fields, left_dim: int, right_dim: int, *, batch: Sequence[tuple[int, int]] = ()
) -> tuple[list[Field], list[Field]]:
    """Ties the labels along a contracted dimension of two operands.

    Args:
        left: Fields of the left operand.
        right: Fields of the right operand.
        left_dim: The left operand's contracted dimension.
        right_dim: The right operand's contracted dimension.
        batch: Dimensions of both that are paired, not contracted.

    Returns:
        The fields that go on, each with its own operand's dimensions.
    """
    passing_left = [f for f in left if left_dim not in f.dims]
    passing_right = [f for f in right if right_dim not in f.dims]
    along_left = [f for f in left if left_dim in f.dims]
    along_right = [f for f in right if right_dim in f.dims]
    pairs = dict(batch)
    for f in along_left:
        # A partner that varies as this one does (through paired dimensions) is tied to it position by position.
        partner = next(
            (g for g in along_right if {pairs.get(d, -1) for d in f.dims - {left_dim}} == g.dims - {right_dim}), None
        )
        # A sum of products loses a term without changing if one factor is exactly zero there. If neither is (after a
        # norm without an affine part, say), the channel must stay, which the else branch does by collapsing.
        if partner is not None and (f.zero or partner.zero):
            along_right.remove(partner)
            ctx.labels.join(*_face(f, partner, left_dim, right_dim, pairs))
            if f.dims != {left_dim}:
                # Both also vary along paired dimensions (heads): what is left there goes on to the result.
                passing_left += ctx.collapse([f], {left_dim})
                passing_right += ctx.collapse([partner], {right_dim})
        else:
            passing_left += ctx.collapse([f], {left_dim})
    passing_right += ctx.collapse(along_right, {right_dim})
    return passing_left, passing_right


def _face(
    f: Field, g: Field, left_dim: int, right_dim: int, pairs: dict[int, int]
) -> tuple[Int64[Tensor, "..."], Int64[Tensor, "..."]]:
    """Both fields' labels with their varying dimensions in the same order."""
    order = sorted(f.dims)
    there = [right_dim if d == left_dim else pairs[d] for d in order]
    return _arranged(f.labels, order), _arranged(g.labels, there)


def _arranged(labels: Int64[Tensor, "..."], order: Sequence[int]) -> Int64[Tensor, "..."]:
    """Labels with these dimensions alone, in this order; they vary along no other."""
    others = (d for d in range(labels.dim()) if d not in order)
    return labels.permute(*order, *others).reshape([labels.shape[d] for d in order])


@rule("linear", "addmm", "_addmm_activation")
def linear(ctx: Context, node: fx.Node) -> Result:
    """``y[..., o] = sum_i x[..., i] w[o, i] + b[o]`` (``addmm`` has the bias first and w as [i, o])."""
    # nn.functional.linear has the weight as (out, in); addmm, which Conv1D of GPT-2 calls, as (in, out).
    if node.target._opname == "linear":  # type: ignore[union-attr]
        x, w, bias, out_axis, in_axis = node.args[0], node.args[1], argument(node, "bias"), 0, 1
    else:
        bias, x, w, out_axis, in_axis = *node.args[:3], 1, 0
    rank = len(ctx.shape(node))
    macs = prod(ctx.shape(node)) * ctx.shape(x)[-1]
    # Labels across the contracted dimension (heads, experts) shrink the number of rows, and so the multiply-adds.
    across = [f.labels for f in ctx.fields(x) if len(ctx.shape(x)) - 1 not in f.dims]
    remember(ctx, node, w, "linear", (out_axis, in_axis), macs, across)
    passing, made = consume(ctx, ctx.fields(x), ctx.fields(w), len(ctx.shape(x)) - 1, in_axis)
    # A weight of one dimension makes no channels: the last dimension of the input disappears.
    if len(ctx.shape(w)) == 1:
        return tuple(f.with_labels(f.labels.squeeze(-1)) for f in passing)
    out = []
    for f in made:
        labels = f.labels.movedim(out_axis, -1).reshape((1,) * (rank - 1) + (f.labels.shape[out_axis],))
        if labels.numel() > 1:
            out.append(f.with_labels(labels))
    product = (*out, *passing)
    if bias is None:
        return product
    return unified(ctx, [(ctx.shape(node), product), (ctx.shape(bias), ctx.fields(bias))], ctx.shape(node), all_zero)


def remember(
    ctx: Context,
    node: fx.Node,
    w: Any,
    op: str,
    axes: tuple[int, int],
    macs: int,
    factors: Sequence[Int64[Tensor, "..."]],
    groups: int = 1,
) -> None:
    """Notes a contraction; of a weight also which it is."""
    module, weight = module_of(node), weight_of(ctx, w, *axes)
    ctx.products.append(Product(node, module, None if weight is None else weight[0], macs, tuple(factors)))
    if weight is not None:
        # The first use decides the axes of a weight that is used several times.
        ctx.uses.setdefault(weight[0], WeightUse(weight[0], module, op, weight[1], weight[2], groups))


@rule("conv1d", "conv2d", "conv3d", "convolution", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def convolution(ctx: Context, node: fx.Node) -> Result:
    """Convolutions: channels are contracted (per group), positions are mixed where the kernel sees more than one."""
    name = node.target._opname  # type: ignore[union-attr]
    x, w = node.args[:2]
    bias, groups = argument(node, "bias"), int(argument(node, "groups", 1))
    transposed = "transpose" in name or bool(name == "convolution" and argument(node, "transposed"))
    rank, shape, wshape = len(ctx.shape(x)), ctx.shape(node), ctx.shape(w)
    # Convolutions also take an input without a batch dimension, whose channels are dimension 0.
    batched = len(wshape) == rank
    channel = 1 if batched else 0
    # Transposed convolutions store their weight as (in, out / groups, kernel).
    out_axis, in_axis = (1, 0) if transposed else (0, 1)

    kind = "conv_transpose" if transposed else "conv"
    # A convolution multiplies once for each output position, a transposed one once for each input position.
    macs = (prod(ctx.shape(x)) * wshape[1] if transposed else prod(shape) * wshape[1]) * prod(wshape[2:])
    xs = ctx.collapse(ctx.fields(x), _mixed(node, wshape, channel, transposed))
    across = [f.labels for f in xs if channel not in f.dims]
    remember(ctx, node, w, kind, (out_axis, in_axis), macs, across, groups)
    # Positions of the kernel never go, so labels along them are joined.
    ws = ctx.collapse(ctx.fields(w), range(2, len(wshape)))
    out_channels = shape[channel]

    if groups == 1:
        passing, made = consume(ctx, xs, ws, channel, in_axis)
    else:
        passing, made = _grouped(ctx, xs, ws, channel, groups, out_channels, transposed)
    out = []
    for f in made:
        view = [1] * len(shape)
        view[channel] = f.labels.numel()
        if f.labels.numel() > 1:
            out.append(f.with_labels(f.labels.reshape(view)))
    product = (*out, *passing)
    if bias is None:
        return product
    column = (out_channels,) + (1,) * (len(shape) - channel - 1)
    biases = tuple(f.with_labels(f.labels.view((-1,) + (1,) * (len(shape) - channel - 1))) for f in ctx.fields(bias))
    return unified(ctx, [(shape, product), (column, biases)], shape, all_zero)


def _mixed(node: fx.Node, wshape: Sequence[int], channel: int, transposed: bool) -> list[int]:
    """Dimensions of the input along which positions do not stay as they are."""
    padding, stride = argument(node, "padding", 0), argument(node, "stride", 1)

    def at(value: Any, i: int, default: int) -> int:
        if isinstance(value, str):
            return 0  # for a kernel of one, "same" and "valid" pad nothing
        parts = list(value) if isinstance(value, (list, tuple)) else [value]
        return int(parts[i % len(parts)]) if parts else default

    return [
        channel + 1 + i
        for i, kernel in enumerate(wshape[2:])
        # A kernel of one without stride and padding leaves positions where they are: pruned tokens would stay aligned.
        if transposed or kernel != 1 or at(stride, i, 1) != 1 or at(padding, i, 0) != 0
    ]


def _grouped(
    ctx: Context, xs: Fields, ws: Fields, channel: int, groups: int, out_channels: int, transposed: bool
) -> tuple[list[Field], list[Field]]:
    """Grouped convolutions.

    Depthwise: an input channel goes with the outputs made from it. Otherwise the same positions go from every
    group, so that all groups stay equally wide.
    """
    x = next((f for f in xs if f.dims == {channel}), None)
    passing = list(ctx.collapse((f for f in xs if f is not x), {channel}))
    rows, columns = ctx.axis_field(ws, 0), ctx.axis_field(ws, 1)
    into, outof = (rows, columns) if transposed else (columns, rows)  # labels along the weight's input and output axes
    per_group = out_channels // groups
    # The weight has size 1 along its input axis, which therefore has no labels: each group reads one channel.
    if not transposed and columns is None and outof is not None and x is not None:  # depthwise
        ctx.labels.join(x.labels.reshape(groups, 1), outof.labels.reshape(groups, per_group))
        return passing, [outof]
    if transposed and x is not None and into is not None:
        return passing, _grouped_transposed(ctx, x, into, outof, groups, per_group)
    if x is None or into is None or outof is None or not (x.zero or into.zero):  # an unlabelled side
        for side in (x, into, outof):
            if side is not None:
                ctx.labels.stay(side.labels, ctx.labels.because + " (grouped)")
        return passing, []
    # groups stays what it is, so every group must keep the same number of channels: position i goes from all groups.
    inner = x.labels.reshape(groups, -1)
    ctx.labels.join(inner, into.labels.reshape(1, -1))
    outer = outof.labels.reshape(groups, per_group)
    ctx.labels.join(outer, outer[:1])
    # Each group makes one channel of all its inputs: losing it would leave a group without outputs.
    if per_group == 1:
        ctx.labels.stay(outof.labels)
        return passing, []
    return passing, [outof]


def _grouped_transposed(
    ctx: Context, x: Field, into: Field, outof: Field | None, groups: int, per_group: int
) -> list[Field]:
    """The same the other way round: the weight has all input channels, and the outputs of one group."""
    ctx.labels.join(x.labels.flatten(), into.labels.flatten())
    if into.labels.numel() == groups:  # depthwise: groups go with their channels
        if outof is not None:
            ctx.labels.stay(outof.labels, ctx.labels.because + " (several outputs of each channel)")
        # The channels go with the weight's input axis, but a group must be named after an axis that makes channels, so
        # the outputs get labels of their own, joined to it.
        made = ctx.labels.fresh(groups)  # not the weight's own: its input axis makes no channels
        ctx.labels.join(made, into.labels.flatten())
        return [into.with_labels(made.repeat_interleave(per_group))]
    inner = into.labels.reshape(groups, -1)
    ctx.labels.join(inner, inner[:1])
    return [] if outof is None else [outof.with_labels(outof.labels.flatten().repeat(groups))]


@rule("matmul", "mm", "bmm", "baddbmm", "mv", "dot", "vdot")
def matmul(ctx: Context, node: fx.Node) -> Result:
    """Matrix products of two activations, or of activations and a parameter."""
    if node.target._opname == "baddbmm":  # type: ignore[union-attr]
        # baddbmm adds its first operand to a product of activations; exported attention puts a mask or bias there.
        ctx.labels.stay_all(ctx.fields(node.args[0]))
        a, b = node.args[1:3]
    else:
        a, b = node.args[:2]
    sa, sb = ctx.shape(a), ctx.shape(b)
    if len(sa) < 2 or len(sb) < 2:
        return _of_vectors(ctx, node, a, b)
    # The parameter may be on either side (`x @ w`, or `w @ x` in mixers). Without one, both are activations.
    axes = (len(sb) - 1, len(sb) - 2)
    macs = prod(ctx.shape(node)) * sa[-1]
    across = [f.labels for f in ctx.fields(a) if len(sa) - 1 not in f.dims]
    if weight_of(ctx, b, *axes) is not None:
        remember(ctx, node, b, "matmul", axes, macs, across)
    elif weight_of(ctx, a, len(sa) - 2, len(sa) - 1) is not None:
        across = [f.labels for f in ctx.fields(b) if len(sb) - 2 not in f.dims]
        remember(ctx, node, a, "matmul", (len(sa) - 2, len(sa) - 1), macs, across)
    else:
        remember(ctx, node, None, "matmul", axes, macs, _factors(ctx.fields(a), ctx.fields(b), sa, sb))
    return product(ctx, ctx.fields(a), sa, ctx.fields(b), sb, ctx.shape(node))


def _of_vectors(ctx: Context, node: fx.Node, a: Any, b: Any) -> Fields:
    """Products in which a vector is a row on the left, or a column on the right; too small to count."""
    sa, sb, fa, fb = ctx.shape(a), ctx.shape(b), ctx.fields(a), ctx.fields(b)
    rank = len(ctx.shape(node))
    if len(sa) == 1:
        sa, fa = (1, *sa), tuple(f.with_labels(f.labels[None]) for f in fa)
    if len(sb) == 1:
        sb, fb = (*sb, 1), tuple(f.with_labels(f.labels[..., None]) for f in fb)
    shape = (*sa[:-2], *sb[:-2], sa[-2], sb[-1])
    squeezed = [d for d, was in ((len(shape) - 1, len(ctx.shape(b))), (len(shape) - 2, len(ctx.shape(a)))) if was == 1]
    out = product(ctx, fa, sa, fb, sb, shape)
    for d in squeezed:
        out = tuple(f.with_labels(f.labels.squeeze(d)) for f in out)
    return out if rank else ()


def _factors(fa: Fields, fb: Fields, sa: tuple[int, ...], sb: tuple[int, ...]) -> tuple[Int64[Tensor, "..."], ...]:
    """Label arrays whose shares multiply to the share of multiply-adds left."""
    # Dimensions of b are renumbered to those of the product, plus one number for its columns, so that a shared batch
    # dimension is counted once.
    shift = len(sa) - len(sb)
    rank = len(sa)
    renumbered = [
        (f, {rank - 1 if d == len(sb) - 2 else (rank if d == len(sb) - 1 else d + shift) for d in f.dims}) for f in fb
    ]
    return crossing([*((f, f.dims) for f in fa), *renumbered])


def crossing(fields: Iterable[tuple[Field, AbstractSet[int]]]) -> tuple[Int64[Tensor, "..."], ...]:
    """Labels of the fields that share no dimension with one before, each given with its dimensions."""
    seen_dims: set[int] = set()
    out = []
    for f, dims in fields:
        if not dims & seen_dims:
            seen_dims |= dims
            out.append(f.labels)
    return tuple(out)


def product(ctx: Context, fa: Fields, sa: Sequence[int], fb: Fields, sb: Sequence[int], shape: Sequence[int]) -> Fields:
    """Fields of ``a @ b`` with batch dimensions."""
    rank = len(shape)
    la, lb = rank - len(sa), rank - len(sb)
    fa = tuple(f.with_labels(f.labels[(None,) * la]) for f in fa)
    fb = tuple(f.with_labels(f.labels[(None,) * lb]) for f in fb)
    sa, sb = (1,) * la + tuple(sa), (1,) * lb + tuple(sb)
    batch = [(d, d) for d in range(rank - 2)]
    left, right = consume(ctx, fa, fb, rank - 1, rank - 2, batch=batch)
    # What goes on: rows of a, columns of b, and whatever varies along batch dimensions, which is paired.
    # `consume` took the contracted dimension out of the fields; what remains is constant along it.
    left = [f.with_labels(f.labels.narrow(rank - 1, 0, 1)) for f in left]
    right = [f.with_labels(f.labels.narrow(rank - 2, 0, 1)) for f in right]
    shape_a, shape_b = (*sa[:-1], 1), (*sb[:-2], 1, sb[-1])
    return unified(ctx, [(shape_a, tuple(left)), (shape_b, tuple(right))], shape, any_zero)


@rule("scaled_dot_product_attention")
def attention(ctx: Context, node: fx.Node) -> Result:
    """Attention in one op: ``softmax(scale q kᵀ + mask) v``."""
    q, k, v = node.args[:3]
    mask, scale = argument(node, "attn_mask"), argument(node, "scale")
    sq, sk, sv = ctx.shape(q), ctx.shape(k), ctx.shape(v)
    fq, fk, fv = ctx.fields(q), ctx.fields(k), ctx.fields(v)
    rank = len(sq)
    scores_shape = (*sq[:-1], sk[-2])
    per_head = prod(scores_shape)
    # The share of heads that remains is the share of scores that is computed: of the fields that vary by head (and
    # perhaps by channel of a head), the widest.
    heads = max(
        (f.labels for f in fq if f.dims <= set(range(rank - 2)) | {rank - 1} and min(f.dims) < rank - 1),
        key=Tensor.numel,
        default=None,
    )
    ctx.products.append(
        Product(node, module_of(node), None, per_head * (sq[-1] + sv[-1]), () if heads is None else (heads,))
    )
    if argument(node, "enable_gqa", False) and sk[-3] != sq[-3]:
        # Grouped-query attention repeats each key and value head for its query heads inside the op. Doing the same to
        # the labels ties a key head to all the query heads that read it.
        times = sq[-3] // sk[-3]

        def repeated(fields: Fields) -> Fields:
            return tuple(
                f.with_labels(f.labels.repeat_interleave(times, rank - 3)) if rank - 3 in f.dims else f for f in fields
            )

        fk, fv = repeated(fk), repeated(fv)
        sk, sv = (*sk[:-3], sq[-3], *sk[-2:]), (*sv[:-3], sq[-3], *sv[-2:])
    if scale is None:
        # The scale is taken from the width of q as it runs, so that width stays; whole heads may go.
        fq, fk = ctx.collapse(fq, {rank - 1}), ctx.collapse(fk, {rank - 1})
    # From here on as the op is defined, in two products, so that scores and values follow the rules for matmul.
    swapped = tuple(f.with_labels(f.labels.transpose(-2, -1)) for f in fk)
    scores = product(ctx, fq, sq, swapped, (*sk[:-2], sk[-1], sk[-2]), scores_shape)
    if isinstance(mask, fx.Node):
        scores = unified(ctx, [(scores_shape, scores), (ctx.shape(mask), ctx.fields(mask))], scores_shape)
    # Softmax of zeros is uniform, not zero, and mixes all keys.
    weights = tuple(f.with_zero(False) for f in ctx.collapse(scores, {rank - 1}))
    return product(ctx, weights, scores_shape, fv, sv, ctx.shape(node))
