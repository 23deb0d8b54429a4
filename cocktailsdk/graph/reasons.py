"""Explains why channels must stay: the cause, and the calls and tensors that lead to it."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence

from jaxtyping import Int64
from torch import Tensor, fx

from .coupling import STAYS, Link, Stay
from .export import module_of
from .labels import Cause
from .rules import Context

__all__ = ["because", "stays"]

DOES = {
    "normalises over these channels": "softmax log_softmax _softmax _log_softmax _safe_softmax normalize",
    "compares these channels with one another": "topk sort argsort argmax argmin max min median kthvalue amax amin",
    "combines these channels into one": (
        "sum mean prod var std norm linalg_norm linalg_vector_norm logsumexp var_mean std_mean"
    ),
}
"""What ops that take channels together do, in words."""

_DOES = {op: does for does, ops in DOES.items() for op in ops.split()}


def because(op: str, module: str) -> str:
    """Why channels stay that an op takes together: ``softmax in layers.0.attention normalises over these channels``."""
    return f"{op} in {module or 'the model'} {_DOES.get(op, 'mixes these channels or needs them all')}"


def stays(
    ctx: Context,
    makers: Sequence[tuple[str, Int64[Tensor, " n"]]],
    root: Int64[Tensor, " labels"],
    of_label: Int64[Tensor, " labels"],
    ops: Mapping[str, str],
) -> tuple[Stay, ...]:
    """What of each parameter and buffer in the graph must stay, by axis, and why.

    Args:
        ctx: The state after a pass over the graph.
        makers: Weights that make channels and the labels of these, in order of execution.
        root: For every label the one that stands for its class, 0 where it stays.
        of_label: For every label its unit, or ``STAYS``.
        ops: Op of every call of the graph, by the call's name.
    """
    axes = [(name, next(iter(f.dims)), f.labels.flatten()) for name, fields in ctx.named_axes.items() for f in fields]
    staying = [(name, axis, labels, labels[of_label[labels] == STAYS]) for name, axis, labels in axes]
    staying = [entry for entry in staying if entry[3].numel()]
    # One label is asked for each axis: the search for causes is the expensive part, and neighbours share a cause.
    first = {int(unprunable[0]) for *_, unprunable in staying if int(root[unprunable[0]]) == 0}
    of_makers = [(name, labels[root[labels] == 0]) for name, labels in makers]
    causes = ctx.labels.causes(sorted(first | {int(m[0]) for _, m in of_makers if m.numel()}), root)
    kin: dict[int, list[str]] = {}
    for name, labels in of_makers:
        if labels.numel():
            kin.setdefault(causes[int(labels[0])].family, []).append(name)
    owners = _Owners([(int(labels[0]), labels.numel(), name, axis) for name, axis, labels in axes])
    where = {node.name: module_of(node) for node in ctx.exported.graph.nodes if isinstance(node, fx.Node)}

    def stay(name: str, axis: int, labels: Tensor, unprunable: Tensor) -> Stay:
        cause = causes.get(int(unprunable[0]), Cause("", "", (), 0))
        links: list[Link] = []
        for call, label in cause.steps:
            link = Link(ops.get(call, ""), where.get(call, ""), *owners.of(label))
            # Consecutive joins by one call to one axis are one step for a reader.
            if not links or links[-1] != link:
                links.append(link)
        return Stay(
            tensor=name,
            axis=axis,
            positions=unprunable.numel(),
            of=labels.numel(),
            reason=cause.reason or "no weight makes these channels",
            module=where.get(cause.at, ""),
            chain=tuple(links),
            makers=tuple(dict.fromkeys(kin.get(cause.family, ()))),
        )

    return tuple(stay(*entry) for entry in staying)


class _Owners:
    """To which tensor's axis a label belongs. An axis has its labels one after the other."""

    def __init__(self, axes: Sequence[tuple[int, int, str, int]]) -> None:
        self._axes = sorted(axes)
        self._starts = [a[0] for a in self._axes]

    def of(self, label: int) -> tuple[str, int]:
        """Name and axis; an empty name where it is no tensor's."""
        at = bisect_right(self._starts, label) - 1
        if at < 0:
            return "", 0
        start, size, name, axis = self._axes[at]
        return (name, axis) if label < start + size else ("", 0)
