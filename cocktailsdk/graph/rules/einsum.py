"""Products told by letters: of any number of operands, one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from string import ascii_letters
from typing import Any

from torch import fx

from ..export import module_of
from ..labels import Fields
from .contraction import consume, crossing
from .elementwise import any_zero, unified
from .reduction import mixed
from .registry import Context, Product, Result, WeightUse, rule
from .weights import weight_of


@rule("einsum")
def einsum(ctx: Context, node: fx.Node) -> Result:
    """Letters that do not go on are contracted where two operands share them, and summed over where one has them."""
    operands: list[Any] = list(node.args[1])  # type: ignore[arg-type]
    inputs, out = _letters(str(node.args[0]), [len(ctx.shape(o)) for o in operands])
    # `ii->i` reads a diagonal, along which rows and columns go by one index.
    if any(len(set(own)) < len(own) for own in inputs):  # a diagonal
        ctx.labels.stay_all(f for o in operands for f in ctx.fields(o))
        return ()
    letters = list(dict.fromkeys((*out, *(c for own in inputs for c in own))))
    sizes = {c: n for own, o in zip(inputs, operands, strict=True) for c, n in zip(own, ctx.shape(o), strict=True)}
    # All operands are brought to one dimension per letter, so a letter is paired with itself.
    every = [(d, d) for d in range(len(letters))]
    weights = [_weight(ctx, node, operands, inputs, out, i) for i in range(len(operands))]

    current, present = _spelled(ctx.fields(operands[0]), inputs[0], letters), set(inputs[0])
    if len(operands) == 1:
        summed = [letters.index(c) for c in inputs[0] if c not in out]
        current, _ = mixed(ctx, current, summed, absent_zeros_count=False)
    for i, (operand, own) in enumerate(zip(operands[1:], inputs[1:], strict=True), start=1):
        other = _spelled(ctx.fields(operand), own, letters)
        # Operands are multiplied from left to right, as torch.einsum does unless opt_einsum finds another order. A
        # letter is summed as soon as nothing after it needs it.
        later = set(out).union(*inputs[i + 1 :])
        macs = prod(sizes[c] for c in present.union(own))
        # The first product has two operands, either of which may be the weight.
        weight = weights[i] or (weights[0] if i == 1 else None)
        _count(ctx, node, weight, macs, current, other, weights[i] is not None)
        for d, c in enumerate(letters):
            if c in later or c not in present.union(own):
                continue
            if c in present and c in own:
                a, b = consume(ctx, current, other, d, d, batch=every)
                current, other = tuple(a), tuple(b)
            else:
                current, _ = mixed(ctx, current, [d], absent_zeros_count=False)
                other, _ = mixed(ctx, other, [d], absent_zeros_count=False)
        shapes = [tuple(sizes[c] if c in s and c in later else 1 for c in letters) for s in (present, set(own))]
        present = present.union(own) & later
        shape = [sizes[c] if c in present else 1 for c in letters]
        current = unified(ctx, [(shapes[0], current), (shapes[1], other)], shape, any_zero)
    return tuple(f.with_labels(f.labels.reshape(f.labels.shape[: len(out)])) for f in current)


def _letters(equation: str, ranks: Sequence[int]) -> tuple[list[str], str]:
    """Letters of each operand and of the result, with letters of their own for the dimensions behind an ellipsis."""
    equation = equation.replace(" ", "")
    terms, arrow, out = equation.partition("->")
    parts = terms.split(",")
    spare = [c for c in ascii_letters if c not in equation]
    hidden = [
        rank - len(part.replace("...", "")) if "..." in part else 0 for part, rank in zip(parts, ranks, strict=True)
    ]
    # An ellipsis stands for as many dimensions as are left over; shorter ones are aligned at the end, as in
    # broadcasting.
    batch = "".join(spare[: max(hidden)])
    inputs = [part.replace("...", batch[len(batch) - n :]) for part, n in zip(parts, hidden, strict=True)]
    if not arrow:
        joined = "".join(inputs)
        return inputs, batch + "".join(sorted(c for c in set(joined) - set(batch) if joined.count(c) == 1))
    return inputs, out.replace("...", batch)


def _spelled(fields: Fields, own: str, letters: Sequence[str]) -> Fields:
    """Fields with one dimension per letter of the whole equation."""
    order = sorted(range(len(own)), key=lambda i: letters.index(own[i]))
    return tuple(
        f.with_labels(
            f.labels.permute(order).reshape([f.labels.shape[own.index(c)] if c in own else 1 for c in letters])
        )
        for f in fields
    )


def _weight(
    ctx: Context, node: fx.Node, operands: Sequence[Any], inputs: Sequence[str], out: str, at: int
) -> str | None:
    """Notes an operand that is a weight: letters that it alone brings to the result are channels that it makes."""
    own, others = inputs[at], set("".join(inputs[:at] + inputs[at + 1 :]))  # type: ignore[operator]
    summed = [d for d, c in enumerate(own) if c not in out and c in others]
    made = [d for d, c in enumerate(own) if c in out and c not in others]
    name = None
    # The last letter that the weight alone brings is its output axis (`nhd` of a projection to heads: d); the others
    # are further makers of channels.
    for out_dim in reversed(made if summed else []):
        found = weight_of(ctx, operands[at], out_dim, summed[-1])
        if found is not None:
            name, out_axis, in_axis = found
            ctx.uses.setdefault(name, WeightUse(name, module_of(node), "matmul", out_axis, in_axis, 1))
            ctx.makers[name, out_axis] = None
    return name


def _count(
    ctx: Context, node: fx.Node, weight: str | None, macs: int, current: Fields, other: Fields, second: bool
) -> None:
    """Notes the multiply-adds, with what they shrink by besides the weight's own elements."""
    fields: Fields = (*current, *other)
    if weight is not None:
        mine, across = (other, current) if second else (current, other)
        own_dims = frozenset().union(*(f.dims for f in mine))
        fields = tuple(f for f in across if not f.dims & own_dims)
    ctx.products.append(Product(node, module_of(node), weight, macs, crossing((f, f.dims) for f in fields)))
