"""Shapes, positions and values of the original that survive in the slim model."""

from __future__ import annotations

from dataclasses import dataclass, field

from jaxtyping import Bool
from torch import Tensor

from .coupling import Node, Trace

__all__ = ["Sizes", "new_shape", "sizes_of", "surviving", "surviving_along"]


@dataclass
class Sizes:
    """Which sizes a module saw change.

    Attributes:
        changed: For each size that shrank somewhere, what it became, in order of appearance.
    """

    changed: dict[int, list[int]] = field(default_factory=dict)

    def add(self, old: int, new: int) -> None:
        """One dimension that went from ``old`` to ``new``."""
        if old != new and new not in self.changed.setdefault(old, []):
            self.changed[old].append(new)


def surviving_along(units: Tensor, keep: Bool[Tensor, " units_and_stays"]) -> dict[int, Bool[Tensor, " n"]]:
    """Which positions are left along each dimension that a unit field varies in."""
    mask = keep[units]
    return {d: mask.movedim(d, 0).reshape(n, -1).any(1) for d, n in enumerate(mask.shape) if n > 1}


def new_shape(node: Node, keep: Bool[Tensor, " units_and_stays"]) -> tuple[int, ...]:
    """A node's shape in the slim model."""
    shape = list(node.shape or ())
    for units in node.units:
        for d, survives in surviving_along(units, keep).items():
            shape[d] = min(shape[d], int(survives.sum()))
    return tuple(shape)


def surviving(value: Tensor, node: Node, keep: Bool[Tensor, " units_and_stays"]) -> Tensor:
    """What is left of a node's value in the slim model."""
    for units in node.units:
        for d, survives in surviving_along(units, keep).items():
            if survives.numel() == value.shape[d]:
                value = value.index_select(d, survives.nonzero().flatten().to(value.device))
    return value


def sizes_of(trace: Trace, keep: Bool[Tensor, " units_and_stays"]) -> dict[str, Sizes]:
    """For each module the sizes that change in what it runs itself: in results first, then in what it is given."""
    out: dict[str, Sizes] = {}
    by_name = {n.name: n for n in trace.nodes}
    became = {n.name: new_shape(n, keep) for n in trace.nodes if n.units and n.shape is not None}
    # Results first: a size that a module makes itself is likelier to be in its attributes than one that it receives.
    for of_inputs in (False, True):
        for node in trace.nodes:
            for name in node.inputs if of_inputs else (node.name,):
                if name in became:
                    seen = out.setdefault(node.module, Sizes())
                    for old, new in zip(by_name[name].shape or (), became[name], strict=True):
                        seen.add(old, new)
    return out
