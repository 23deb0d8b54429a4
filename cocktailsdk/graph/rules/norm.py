"""Norms: batch norm is per channel; LayerNorm takes its statistics over all channels, absent zeros included."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

from jaxtyping import Int64
from torch import Tensor, fx

from ..coupling import Norm, Scale
from ..export import module_of, op_name
from ..labels import Field, Fields
from .elementwise import unified
from .registry import Context, Result, argument, rule
from .weights import zero_sources


def _affine(
    ctx: Context, fields: Fields, shape: Sequence[int], parameters: Sequence[Any], view: Sequence[int]
) -> tuple[Fields, bool]:
    """Joins channels with per-channel parameters.

    Returns:
        The fields, and whether weight and bias make a masked channel zero.
    """
    nodes = [p for p in parameters if isinstance(p, fx.Node)]
    views = [(tuple(view), tuple(f.with_labels(_viewed(f, view)) for f in ctx.fields(p))) for p in nodes]
    # Norms without parameters, or with a constant one, turn a masked channel into -mean / std.
    affine = isinstance(parameters[0], fx.Node) and (parameters[1] is None or isinstance(parameters[1], fx.Node))
    return unified(ctx, [(tuple(shape), fields), *views], shape), affine


def _viewed(f: Field, view: Sequence[int]) -> Int64[Tensor, "..."]:
    """A parameter's labels as they meet what is normalised: one axis anywhere, or several at the end."""
    rank = f.labels.dim()
    return f.labels.reshape(tuple(view)) if rank == 1 else f.labels[(None,) * (len(view) - rank)]


BY_CHANNEL = """
    batch_norm _batch_norm_with_update native_batch_norm _native_batch_norm_legit_no_training cudnn_batch_norm
    instance_norm
""".split()  # noqa: SIM905


@rule(*BY_CHANNEL)
def batch_norm(ctx: Context, node: fx.Node) -> Result:
    """Batch norm (in eval mode, with running statistics) and instance norm: each channel by itself."""
    x = node.args[0]
    shape = ctx.shape(x)
    view = (1, shape[1]) + (1,) * (len(shape) - 2)
    fields = ctx.fields(x)
    name = _op(node)
    if name == "batch_norm" and bool(argument(node, "training", False)):
        return _of_a_batch(ctx, node, fields, shape, view)
    if name == "instance_norm":
        # Instance norm takes its statistics over positions, which are therefore mixed.
        fields = ctx.collapse(fields, range(2, len(shape)))
    out, affine = _affine(ctx, fields, shape, node.args[1:5], view)
    # Masked weight and bias make the channel zero, whatever came in; without them it is -mean/std.
    out = tuple(f.with_zero(affine and 1 in f.dims) for f in out)
    # The native variants return saved statistics, too, which nothing of a model reads in eval mode.
    several = not hasattr(node.meta["val"], "shape")
    return (out, (), ()) if several else out


@rule("layer_norm", "native_layer_norm", "rms_norm")
def layer_norm(ctx: Context, node: fx.Node) -> Result:
    """LayerNorm over labelled channels: exact if the absent channels are zeros that are counted.

    The slim model then needs a norm that remembers how many channels there were, which takes the place of the module
    that ran this op. Where that module does more than normalise, the channels stay.
    """
    # The statistics are a mean over channels. Absent channels change it only by their number if they were zero, so the
    # slim norm divides by the original number (see layers.py).
    x, normalized = node.args[:2]
    weight = node.args[2] if len(node.args) > 2 else None
    name = node.target._opname  # type: ignore[union-attr]
    bias = None if name == "rms_norm" or len(node.args) < 4 else node.args[3]
    shape = ctx.shape(x)
    rank, n = len(shape), len(normalized)  # type: ignore[arg-type]
    inside = set(range(rank - n, rank))
    out: list[Field] = []
    axis = replaceable(ctx, node)
    # Called as a function inside other code: the module's forward is rewritten to count absent channels.
    called_inside = name == "layer_norm" and module_of(node) != ""
    for f in ctx.fields(x):
        if not f.dims & inside:
            out.append(f)
        elif f.dims == {rank - 1} and n == 1 and f.zero and (axis is not None or called_inside):
            if axis is None:
                ctx.counted.add(module_of(node))
            else:
                kind = "rms" if name == "rms_norm" else "layer"
                ctx.norms[module_of(node)] = Norm(kind, axis, shape[-1], argument(node, "eps"))
            out.append(f)
        else:
            out += ctx.collapse([f], inside)
    view = (1,) * (rank - n) + tuple(shape[rank - n :])
    fields, affine = _affine(ctx, tuple(out), shape, [weight, bias], view)
    # RMSNorm subtracts no mean, so a zero stays zero even without a masked weight.
    zero = affine or name == "rms_norm"
    fields = tuple(f.with_zero(zero and bool(f.dims & inside)) for f in fields)
    several = not hasattr(node.meta["val"], "shape")
    return (fields, (), ()) if several else fields


def _of_a_batch(ctx: Context, node: fx.Node, fields: Fields, shape: Sequence[int], view: Sequence[int]) -> Fields:
    """Batch norm by the statistics of what it is given: how weights are standardised.

    Fan-in positions may go where they are zero and the module that runs this can count the absent ones.
    """
    per_row: list[Field] = []
    across: list[Field] = []
    for f in fields:
        if not f.dims - {1}:
            per_row.append(f)
        # Standardised convolutions normalise each row of the weight over its fan-in, as (1, out, fan_in).
        elif f.zero and 1 not in f.dims and module_of(node):
            ctx.counted.add(module_of(node))
            across.append(f.with_zero(False))
        else:
            per_row += ctx.collapse([f], f.dims - {1})
    rows, _ = _affine(ctx, tuple(per_row), shape, node.args[1:3], view)
    bias = len(node.args) > 2 and isinstance(node.args[2], fx.Node)
    zero = {f.dims: f.zero for f in per_row}
    scaled = tuple(f.with_zero(zero.get(f.dims, False) or (bias and isinstance(node.args[1], fx.Node))) for f in rows)
    return (*scaled, *across)


@rule("_weight_norm", "_weight_norm_interface")
def weight_norm(ctx: Context, node: fx.Node) -> Result:
    """``g v / |v|``, with a norm for every position along a dimension (or one for all, where that is -1).

    Absent inputs add nothing to a norm. A position that goes would be 0 / 0: its scale is masked in its place, which
    makes the weight zero there. Where the scale or the direction is no parameter that is used for this alone, the
    position stays.
    """
    v, g = node.args[:2]
    dim = int(argument(node, "dim", 0))
    axis = None if dim == -1 else dim
    name = scaled_by(ctx, v, g, axis)
    rows = tuple(f for f in (*ctx.fields(v), *ctx.fields(g)) if axis in f.dims)
    if name is None:
        for f in rows:
            ctx.labels.stay(
                f.labels,
                f"weight norm in {module_of(node) or 'the model'} divides these channels by each one's own norm, which "
                "masking makes zero (remove it before slimming: torch.nn.utils.parametrize.remove_parametrizations)",
            )
    else:
        for f in rows[1:]:
            ctx.labels.join(rows[0].labels, f.labels)
    fields = tuple(f for f in ctx.fields(v) if f.labels.dim() == len(ctx.shape(node)))
    return fields if hasattr(node.meta["val"], "shape") else (fields, ())


def scaled_by(ctx: Context, v: Any, g: Any, axis: int | None) -> str | None:
    """Notes that a parameter is divided by a norm of its own and multiplied with another.

    Returns:
        The other's name, where it can be masked in place of positions of the first: both are parameters, of as many
        positions, and used for nothing else.
    """
    direction, scale = ctx.tensor_name(v), ctx.tensor_name(g)
    trainable = ctx.exported.trainable
    if direction is not None and scale is not None and {direction, scale} <= trainable:
        sizes = ctx.exported.shapes[direction], ctx.exported.shapes[scale]
        fits = sizes[1] == tuple(n if d == axis else 1 for d, n in enumerate(sizes[0])) or (
            axis is None and prod(sizes[1]) == 1
        )
        used = {(op_name(u), u.args[:2]) for name in (direction, scale) for u in ctx.readers(name)}
        alone = all(op in ("_weight_norm", "_weight_norm_interface") for op, _ in used)
        pairs = {tuple(map(ctx.tensor_name, args)) for _, args in used}
        if fits and alone and pairs == {(direction, scale)}:
            ctx.scales[direction] = Scale(scale, axis)
            return scale
    # The norm is of a computed weight: there is no parameter to mask in its place.
    for name in zero_sources(ctx, v):
        ctx.scales.setdefault(name, Scale("", axis))
    return None


AROUND_NORM = frozenset(
    "layer_norm rms_norm permute contiguous transpose to _to_copy alias clone type_as".split()  # noqa: SIM905
)


def replaceable(ctx: Context, node: fx.Node) -> int | None:
    """The channel axis of the input of the module that ran a norm, if the module does nothing else.

    Returns:
        The axis, or ``None`` where the norm is not a module by itself.
    """
    module = module_of(node)
    nodes = ctx.nodes_of(module)
    if not module or ctx.runs_children(module) or any(_op(n) not in AROUND_NORM for n in nodes):
        return None
    if sum(n.target._opname in ("layer_norm", "rms_norm") for n in nodes) != 1:  # type: ignore[union-attr]
        return None
    owned = {name.rpartition(".")[2] for name in ctx.exported.shapes if name.rpartition(".")[0] == module}
    if not owned <= {"weight", "bias"}:
        return None
    # ConvNeXt-style norms permute to channels-last, normalise, and permute back.
    # Follow the channel axis from the norm's input back to the module's input, and forward to its output.
    axis = len(ctx.shape(node.args[0])) - 1
    current: Any = node.args[0]
    while isinstance(current, fx.Node) and current in nodes:
        axis = _axis_before(ctx, current, axis)
        current = current.args[0]
    end = len(ctx.shape(node)) - 1
    last = node
    for n in nodes[nodes.index(node) + 1 :]:
        end = _axis_after(ctx, n, end)
        last = n
    # A result in the middle that other code reads would be lost with the module.
    outside = [u for n in nodes if n is not last for u in n.users if u not in nodes]
    return axis if axis == end and not outside else None


def _op(node: Any) -> str:
    return str(node.target._opname)


def _axis_before(ctx: Context, node: fx.Node, axis: int) -> int:
    name, rank = node.target._opname, len(ctx.shape(node))  # type: ignore[union-attr]
    if name == "permute":
        return [int(d) % rank for d in argument(node, "dims")][axis]
    if name == "transpose":
        a, b = int(node.args[1]) % rank, int(node.args[2]) % rank  # type: ignore[arg-type]
        return b if axis == a else a if axis == b else axis
    return axis


def _axis_after(ctx: Context, node: fx.Node, axis: int) -> int:
    name, rank = node.target._opname, len(ctx.shape(node))  # type: ignore[union-attr]
    if name == "permute":
        return [int(d) % rank for d in argument(node, "dims")].index(axis)
    return _axis_before(ctx, node, axis)


@rule("group_norm", "native_group_norm")
def group_norm(ctx: Context, node: fx.Node) -> Result:
    """GroupNorm: whole groups may go, since each group's statistics are its own; of one group any channels."""
    x = node.args[0]
    shape = ctx.shape(x)
    # native_group_norm has the arguments (x, weight, bias, N, C, HxW, groups, eps).
    native = node.target._opname != "group_norm"  # type: ignore[union-attr]
    groups = int(node.args[6] if native else node.args[1])  # type: ignore[arg-type]
    weight, bias = (node.args[1], node.args[2]) if native else (argument(node, "weight"), argument(node, "bias"))
    eps: Any = node.args[-1] if native else argument(node, "eps")
    view = (1, shape[1]) + (1,) * (len(shape) - 2)
    joined: list[Field] = []
    positions = [d for d in range(len(shape)) if d != 1]
    for f in (g for field in ctx.fields(x) for g in ctx.collapse([field], positions)):
        # One group has statistics over all channels, as LayerNorm has.
        if groups == 1 and 1 in f.dims:
            module = module_of(node)
            others = [n for n in ctx.nodes_of(module) if n is not node and _op(n) not in AROUND_NORM]
            if not module or not f.zero or others or ctx.runs_children(module):
                ctx.labels.stay(f.labels)
                continue
            ctx.norms[module] = Norm("group", 1, shape[1], float(eps))
        elif 1 in f.dims:
            # Statistics of a group over fewer of its channels would differ, so the channels of a group go together.
            rows = f.labels.reshape(groups, -1)
            ctx.labels.join(rows, rows[:, :1])
        joined.append(f)
    out, affine = _affine(ctx, tuple(joined), shape, [weight, bias], view)
    out = tuple(f.with_zero(affine and 1 in f.dims) for f in out)
    return (out, (), ()) if native else out
