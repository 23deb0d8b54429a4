"""Elementwise ops: labels of the operands are joined position by position under broadcasting."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import fx

from ..coupling import Scale
from ..export import module_of, op_name
from ..labels import Field, Fields
from .op_sets import ADDITIVE, FAKE_QUANTIZATION, KEEP_ZERO, LOSE_ZERO
from .registry import Context, Result, rule
from .weights import zero_sources


def unify(
    ctx: Context, operands: Sequence[tuple[tuple[int, ...], Fields]], shape: Sequence[int]
) -> list[list[Field | None]]:
    """Joins the fields of operands that meet elementwise.

    Args:
        operands: Shape and fields of each operand.
        shape: The result's shape.

    Returns:
        For every field of the result the operands' own contributions (``None`` for an operand that has none), all with
        the same labels up to joining; the first that is not ``None`` carries the labels.
    """
    rank = len(shape)
    aligned: list[tuple[tuple[int, ...], list[Field]]] = []
    for own, operand_fields in operands:
        # Broadcasting aligns shapes at the end, so missing dimensions are added in front.
        extra = rank - len(own)
        aligned.append(((1,) * extra + tuple(own), [f.with_labels(f.labels[(None,) * extra]) for f in operand_fields]))

    # An operand that varies along a dimension without labels there asks for all of it.
    for d in range(rank):
        # A dimension of size 1, or without labels on any operand, ties nothing.
        if shape[d] <= 1 or not any(d in f.dims for _, fields in aligned for f in fields):
            continue
        if any(own[d] > 1 and not any(d in f.dims for f in fields) for own, fields in aligned):
            for _, own_fields in aligned:
                own_fields[:] = ctx.collapse(own_fields, {d})

    # Each operand may have several fields (heads and channels, say). A row collects those that vary along the same
    # dimensions, at most one of each operand, so that labels are joined only where they mean the same.
    rows: list[Row] = []
    for operand, (_, fields) in enumerate(aligned):
        for f in fields:
            _place(ctx, rows, operand, f)
    out = []
    for row in rows:
        # Only the dimensions that all fields of a row share survive; along the others the labels are joined first,
        # since one label of the narrower field meets every one of the wider field.
        dims = frozenset.intersection(*(f.dims for f in row.values()))
        reduced = {i: remaining for i, f in row.items() if (remaining := _reduced(ctx, f, dims)) is not None}
        present = list(reduced.values())
        # Position by position, under broadcasting: where one of these channels goes, the others must go with it.
        for f in present[1:]:
            ctx.labels.join(present[0].labels, f.labels)
        if present:
            out.append([reduced.get(i) for i in range(len(operands))])
    return out


Row = dict[int, Field]
"""Fields that meet, by operand."""


def _reduced(ctx: Context, f: Field, dims: frozenset[int]) -> Field | None:
    return f if f.dims == dims else ctx.labels.collapse(f, f.dims - dims)


def _place(ctx: Context, rows: list[Row], operand: int, f: Field) -> None:
    """Puts a field into the row it joins: of the same dimensions, else one that overlaps, else a new one.

    Where one field varies along rows and columns and the other only along columns (a norm's weight shared by all
    heads), the rows survive: the first field is joined along the columns, and the second stays.
    """
    open_rows = [row for row in rows if operand not in row]
    for row in open_rows:
        if _dims(row) == f.dims:
            row[operand] = f
            return
    for row in open_rows:
        shared = _dims(row) & f.dims
        if not shared:
            continue
        # `min` finds the outer dimension of the wider field. Where it is shared, the narrower field varies by row (one
        # value a head), and both can meet along it.
        wider = max(_dims(row), f.dims, key=len)
        if min(wider) in shared:
            row[operand] = f
            return
        # The wider field is in the row already: it gives up the shared dimension, and the new field stays whole.
        if len(_dims(row)) >= len(f.dims):
            ctx.labels.stay(f.labels)
            remaining = {i: rest for i, g in row.items() if (rest := ctx.labels.collapse(g, shared)) is not None}
            row.clear()
            row.update(remaining)
            if not row:
                rows.remove(row)
            return
        # The new field is the wider one: what the row has stays whole, and the rest of the new field is placed
        # again, as it may meet another row.
        rows.remove(row)
        ctx.labels.stay_all(row.values())
        rest = ctx.labels.collapse(f, shared)
        if rest is not None:
            _place(ctx, rows, operand, rest)
        return
    rows.append({operand: f})


def _dims(row: Row) -> frozenset[int]:
    return frozenset.intersection(*(f.dims for f in row.values()))


def combine(
    ctx: Context, operands: Sequence[Any], shape: Sequence[int], zero: Callable[[list[Field | None]], bool]
) -> Fields:
    """Fields of an elementwise result.

    Args:
        operands: Nodes or numbers.
        shape: The result's shape.
        zero: From an operand's contributions to a field, the result's zero bit.
    """
    return unified(ctx, [(ctx.shape(a), ctx.fields(a)) for a in operands], shape, zero)


def unified(
    ctx: Context,
    operands: Sequence[tuple[tuple[int, ...], Fields]],
    shape: Sequence[int],
    zero: Callable[[list[Field | None]], bool] | None = None,
) -> Fields:
    """The fields of operands that meet elementwise, joined to one for each row of :func:`unify`.

    Args:
        operands: Shape and fields of each operand.
        shape: The result's shape.
        zero: From an operand's contributions to a field, the result's zero bit; without it that of the first.
    """
    fields = []
    for row in unify(ctx, operands, shape):
        first = next(f for f in row if f is not None)
        fields.append(first if zero is None else first.with_zero(zero(row)))
    return tuple(fields)


def all_zero(row: list[Field | None]) -> bool:
    """A sum is zero where every operand is."""
    return all(f is not None and f.zero for f in row)


def any_zero(row: list[Field | None]) -> bool:
    """A product is zero where one operand is."""
    return any(f is not None and f.zero for f in row)


def first_zero(row: list[Field | None]) -> bool:
    """The result is zero where the first operand is, whatever the others are."""
    return all_zero(row[:1])


@rule(*KEEP_ZERO)
def keeps_zero(ctx: Context, node: fx.Node) -> Result:
    """One operand, f(0) = 0."""
    return ctx.fields(node.args[0])


@rule(*LOSE_ZERO)
def loses_zero(ctx: Context, node: fx.Node) -> Result:
    """A function that does not keep zeros."""
    return combine(ctx, _operands(node), ctx.shape(node), lambda row: False)


@rule(*ADDITIVE)
def additive(ctx: Context, node: fx.Node) -> Result:
    """Sums, and choices between operands: zero where all are."""
    name = node.target._opname  # type: ignore[union-attr]
    if name == "where":
        # A condition chooses a value and adds none, so it ties channels but does not decide whether they are zero.
        condition, *values = node.args
        return combine(ctx, [*values, condition], ctx.shape(node), lambda row: all_zero(row[:2]))
    return combine(ctx, node.args, ctx.shape(node), all_zero)


@rule("mul", "multiply", "logical_and", "__and__")
def multiplicative(ctx: Context, node: fx.Node) -> Result:
    """Products: zero where one operand is."""
    return combine(ctx, _operands(node), ctx.shape(node), any_zero)


@rule("div", "divide", "true_divide")
def division(ctx: Context, node: fx.Node) -> Result:
    """Quotients: zero where the numerator is, unless the denominator is masked with it (0/0)."""
    fields = combine(
        ctx,
        node.args[:2],
        ctx.shape(node),
        # 0 / 0 is NaN: the quotient is zero only if the denominator stays away from zero.
        lambda row: first_zero(row) and not any_zero(row[1:]),
    )
    for f in ctx.fields(node.args[1]):
        if f.zero:
            ctx.labels.stay(f.labels, "divided by channels that masking would make zero")
    # `w / |w|` with a norm that vanishes with `w` (weight norm, spectral norm): masking all of `w` would give 0 / 0, so
    # the scale that multiplies it later is masked in its place.
    for name in zero_sources(ctx, node.args[0]):
        if vanishes_with(ctx, node.args[1], name):
            varying = [d for d, n in enumerate(ctx.shape(node.args[1])) if n > 1]
            ctx.scales.setdefault(name, Scale("", varying[0] if len(varying) == 1 else None))
    return fields


_BOUNDED = {"add", "clamp", "clamp_min", "maximum", "exp", "softplus", "sigmoid"}
"""Ops that keep a divisor from zero: ``|w| + eps``."""


def vanishes_with(ctx: Context, divisor: Any, name: str) -> bool:
    """Whether a divisor is zero once all of a parameter is (its norm, its largest singular value)."""
    if not isinstance(divisor, fx.Node) or op_name(divisor) in _BOUNDED or ctx.depends_on_inputs(divisor):
        return False
    if ctx.tensor_name(divisor) is not None:
        return ctx.tensor_name(divisor) == name
    return any(vanishes_with(ctx, source, name) for source in divisor.all_input_nodes)


@rule("pow", "float_power")
def power(ctx: Context, node: fx.Node) -> Result:
    """A power keeps zeros if its exponent is a positive number."""
    # 0 ** 0 is 1 and 0 ** -1 is infinite; an exponent that is a tensor may be either.
    exponent = node.args[1]
    positive = bool(isinstance(exponent, (int, float)) and exponent > 0)
    return combine(ctx, node.args[:2], ctx.shape(node), lambda row: positive and first_zero(row))


@rule("clamp", "clamp_min", "clamp_max", "clip", "hardtanh", "threshold")
def clamp(ctx: Context, node: fx.Node) -> Result:
    """Bounds keep zeros if zero lies between them."""
    low, high = (*node.args[1:3], None, None)[:2]
    name = node.target._opname.rstrip("_")  # type: ignore[union-attr]
    # clamp_max(x, high) has its only bound where clamp(x, low, high) has the lower one.
    if name == "clamp_max":
        low, high = None, low
    numbers = all(b is None or isinstance(b, (int, float)) for b in (low, high))
    # `threshold(x, t, value)` has a replacement value, not an upper bound, in the same place.
    keeps = numbers and bool(low is None or low <= 0) and bool(high is None or high >= 0) and name != "threshold"  # type: ignore[operator]
    return combine(ctx, _operands(node), ctx.shape(node), lambda row: bool(keeps) and first_zero(row))


@rule("masked_fill")
def masked_fill(ctx: Context, node: fx.Node) -> Result:
    """Some positions are replaced by a number."""
    value = node.args[2]
    fills_zero = isinstance(value, (int, float)) and value == 0
    return combine(ctx, node.args[:2], ctx.shape(node), lambda row: fills_zero and first_zero(row))


@rule("addcmul", "addcdiv")
def addcmul(ctx: Context, node: fx.Node) -> Result:
    """A sum and a product in one."""
    return combine(ctx, node.args[:3], ctx.shape(node), lambda row: first_zero(row) and any_zero(row[1:]))


@rule("prelu", "_prelu_kernel")
def prelu(ctx: Context, node: fx.Node) -> Result:
    """A slope per channel, along dimension 1."""
    x, slope = node.args[:2]
    rank = len(ctx.shape(x))
    n = ctx.shape(slope)[0] if ctx.shape(slope) else 1
    # The slope is a vector that PReLU applies along dimension 1, not along the last as broadcasting would.
    view = (1, n) + (1,) * (rank - 2)
    slopes = tuple(f.with_labels(f.labels.reshape(view)) for f in ctx.fields(slope))
    operands = [(ctx.shape(x), ctx.fields(x)), (view, slopes)]
    return unified(ctx, operands, ctx.shape(node), first_zero)


@rule(*sorted(FAKE_QUANTIZATION))
def fake_quantization(ctx: Context, node: fx.Node) -> Result:
    """Values rounded to a grid whose range is taken from all channels, absent ones included."""
    for source in node.all_input_nodes:
        ctx.labels.stay_all(
            ctx.fields(source),
            f"fake quantization in {module_of(node) or 'the model'} takes its range from all channels",
        )
    # The `_cachemask` variants also return a mask.
    return () if hasattr(node.meta["val"], "shape") else ((), ())


def _operands(node: fx.Node) -> list[Any]:
    """Tensor and number operands, whichever way they were given."""
    return [
        a
        for a in [*node.args, *node.kwargs.values()]
        if isinstance(a, fx.Node) or (isinstance(a, (int, float)) and not isinstance(a, bool))
    ]
