"""Writing in place: into tensors, and into parts of them that other values share."""

from __future__ import annotations

from torch import fx

from ..labels import Field, Fields
from .elementwise import combine
from .registry import Context, Result, rule

VIEWS = frozenset(
    """
    alias chunk contiguous detach diagonal expand expand_as flatten getitem movedim mT narrow permute reshape select
    slice split split_with_sizes squeeze swapaxes t tensor_split transpose unbind unflatten unsqueeze view view_as
    view_as_complex view_as_real
    """.split()  # noqa: SIM905
)
"""Ops whose result may share its values with their operand."""


@rule("fill", "zero", "uniform", "normal", "bernoulli")
def fill(ctx: Context, node: fx.Node) -> Result:
    """Every element becomes the same number, or noise."""
    name = node.target._opname.rstrip("_")  # type: ignore[union-attr]
    zero = name == "zero" or (name == "fill" and bool(node.args[1] == 0))
    return tuple(f.with_zero(f.zero and zero) for f in ctx.fields(node.args[0]))


@rule("copy")
def copy(ctx: Context, node: fx.Node) -> Result:
    """Values of another tensor, written over those that were there."""
    return combine(ctx, node.args[:2], ctx.shape(node), lambda row: row[1] is not None and row[1].zero)


def mutated(ctx: Context, node: fx.Node) -> None:
    """Lets a tensor that was written to, and all that share its values, have the fields that it has now.

    Args:
        ctx: The state, in which the node's own result is known.
        node: An op in place.
    """
    # Later nodes read the tensor that was written to, not the node of the write, so its fields are replaced. Views made
    # before share its memory, and their zero bits may no longer hold.
    target, result = node.args[0], ctx.env[node]
    # Parameters and buffers keep the fields of their axes; writes into them (batch counters, caches) tie nothing.
    if not isinstance(target, fx.Node) or target.op != "call_function":
        return
    before: Fields = ctx.fields(target)
    now: Fields = tuple(f for f in result if isinstance(f, Field))
    ctx.env[target] = now
    shared = _sharing(target)
    if not shared:
        return
    known = [f.labels for f in before]
    ctx.labels.stay_all(
        (f for f in now if not any(f.labels is k or f.labels.equal(k) for k in known)),
        ctx.labels.because + " (written into a part of another tensor)",
    )
    if any(f.zero for f in before) and not all(f.zero for f in now):
        for other in shared:
            previous = ctx.env.get(other, ())
            ctx.env[other] = tuple(
                f.with_zero(False) if isinstance(f, Field) else tuple(g.with_zero(False) for g in f) for f in previous
            )  # type: ignore[assignment]


def _sharing(node: fx.Node) -> list[fx.Node]:
    """All other values so far that may share a value's storage: what it is a part of, and parts of that."""
    # Up to the tensor that owns the memory, then down to all views of it.
    root = node
    while _name(root) in VIEWS and isinstance(root.args[0], fx.Node) and root.args[0].op == "call_function":
        root = root.args[0]
    found, pending = [], [root]
    while pending:
        current = pending.pop()
        found.append(current)
        pending += [user for user in current.users if _name(user) in VIEWS and user.args[0] is current]
    return [other for other in found if other is not node]


def _name(node: fx.Node) -> str:
    return str(getattr(node.target, "_opname", getattr(node.target, "__name__", ""))).rstrip("_")
