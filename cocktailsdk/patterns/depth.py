"""Depth: whole residual branches go, so that their blocks hand the stream on as it is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import PatternError
from ..graph import EXCLUDED, Branch, Coupling, Weight
from ..masks import Mask
from .base import UMG, Pattern, Subnet, checked_sparsities
from .checking import covered_share, refuse
from .magnitudes import Terms, row_sums
from .registry import register_pattern
from .unit_scores import checked_beta, terms_of

__all__ = ["Depth", "branch_scores", "removable_branches"]


def removable_branches(coupling: Coupling, eligible: Sequence[Weight]) -> tuple[Branch, ...]:
    """The residual branches that may go: those of eligible weights alone."""
    names = {w.name for w in eligible}
    excluded = {k.where for k in coupling.kept if EXCLUDED in k.reason}
    # weights whose elements cannot be masked (standardised ones) go with a whole branch
    names |= {w.name for w in coupling.weights if w.unmaskable and not w.role and w.name not in excluded}
    return tuple(b for b in coupling.branches if names.issuperset(b.weights))


def branch_scores(umg: UMG, branches: Sequence[Branch], beta: float) -> list[float]:
    """How much each branch does: what ``UMG.layer_scores`` says of its name, otherwise what its weights say.

    That is the mean over its weights of their mean magnitude times the root of the fan-in. By that factor weights of
    any width score alike when they are drawn as layers usually are. Magnitudes are those under the masks made this
    round, in the channel score's terms. Where a score of elements was chosen, its values stand in place of the weights.
    """
    given = umg.layer_scores or {}
    terms = terms_of(umg, beta)
    weights = {w.name: w for w in umg.coupling.weights}
    return [
        given[b.name]
        if b.name in given
        else sum(_strength(weights[n], umg.ranked[n], terms) for n in b.weights) / len(b.weights)
        for b in branches
    ]


def _strength(weight: Weight, value: Tensor, terms: Terms) -> float:
    total = float(row_sums(weight.name, value, weight.out_axis, terms).sum())
    outputs = weight.shape[weight.out_axis] * (weight.groups if weight.op == "conv_transpose" else 1)
    return total / weight.numel * math.sqrt(weight.numel / outputs)


@register_pattern("depth")
class Depth(Pattern):
    """Drops the same share of residual branches, nested over its levels.

    A branch is what a sum adds to a stream: the convolutions of a residual block whose shortcut is the identity, an
    attention, an MLP. Everything that only it uses is masked, so that it adds exactly nothing. Of n branches of
    eligible weights exactly ``round(sparsity * n)`` go, never all; those of least score (:func:`branch_scores`), ties
    by position. ``net.slim`` takes their modules out where the model's code allows it.

    Args:
        sparsities: Ascending, in [0, 1]; by default ``1 - (1 - rate)^k`` for k = 1 … rounds.
        rounds: Number of default levels.
        rate: Share of the kept branches that each default level removes.
        beta: Weight of the unstructured term in the score; the N:M term has the rest.

    Raises:
        PatternError: An argument makes no sense; when masks are made, that no branch can go.
    """

    after = ("unstructured", "n:m")
    ranks = "layers"

    def __init__(
        self, sparsities: Sequence[float] | None = None, rounds: int = 10, rate: float = 0.1, beta: float = 0.8
    ) -> None:
        self.sparsities, self._subnets, self._levels = checked_sparsities(self.name, sparsities, rounds, rate)
        self.beta = checked_beta(self.name, beta)

    def subnets(self) -> tuple[Subnet, ...]:
        """Its subnetworks, from the deepest to the shallowest."""
        return self._subnets

    def mask(self, subnet: Subnet, umg: UMG) -> Mask:
        """The branches of least score go."""
        branches = removable_branches(umg.coupling, umg.eligible)
        if not branches:
            raise PatternError(
                f"{subnet.name!r}: no residual branch of this model can go: none ends in a sum whose other operand is "
                "the stream that it starts from, or its weights are not eligible"
            )
        before = {b.name for b in umg.previous.dropped(umg.coupling)} if umg.previous is not None else set[str]()
        scores = branch_scores(umg, branches, self.beta)
        order = sorted(range(len(branches)), key=lambda i: (branches[i].name not in before, scores[i], i))
        count = max(len(before), min(round(subnet.sparsity * len(branches)), len(branches) - 1))
        gone = [branches[i] for i in sorted(order[:count])]
        if not gone:  # said in so many words: no unit and no branch goes
            return Mask(removed=torch.zeros(umg.coupling.n_units, dtype=torch.bool))
        shapes = umg.coupling.shapes
        return Mask({t: torch.zeros(shapes[t], dtype=torch.bool) for b in gone for t in b.tensors})

    def droppable(self, coupling: Coupling, eligible: Sequence[Weight]) -> Mapping[str, tuple[str, ...]]:
        """The branches that may go."""
        return {b.name: b.tensors for b in removable_branches(coupling, eligible)}

    def exact_sparsity(self, subnet: Subnet, mask: Mask, umg: UMG) -> float:
        """Dropped branches among all that may go."""
        del subnet
        n = len(removable_branches(umg.coupling, umg.eligible))
        return len(mask.dropped(umg.coupling)) / n if n else 0.0

    def check(self, subnet: Subnet, mask: Mask, umg: UMG) -> None:
        """Exactly as many branches go as asked for, each as a whole, and nothing else is masked.

        A branch may lie within another and goes with it. So the count lies between that of the dropped branches that
        lie in no other dropped one, and that of all dropped ones.

        Raises:
            PatternError: It is not so.
        """
        if mask.removed is not None and bool(mask.removed.any()):
            refuse(subnet, "channel units are removed, and the pattern removes none")
        branches = removable_branches(umg.coupling, umg.eligible)
        names = {b.name for b in branches}
        gone = [b for b in mask.dropped(umg.coupling) if b.name in names]
        odd = set(mask.elements).difference(*(b.tensors for b in gone))
        if odd or any(bool(keep.any()) for keep in mask.elements.values()):
            refuse(subnet, f"{min(odd or mask.elements)!r} is masked, but no branch is that holds it")
        outer = [b for b in gone if not any(set(b.tensors) < set(other.tensors) for other in gone)]
        wanted = min(round(subnet.sparsity * len(branches)), max(len(branches) - 1, 0))
        if not len(outer) <= wanted <= len(gone):
            refuse(subnet, f"{len(gone)} of the {len(branches)} branches are dropped, not {wanted}")

    def coverage(self, subnet: Subnet, mask: Mask, umg: UMG) -> float:
        """The share of the eligible weights that lie in branches."""
        del subnet, mask
        within = {n for b in removable_branches(umg.coupling, umg.eligible) for n in b.weights}
        return covered_share(umg, lambda weight: weight.numel if weight.name in within else 0)

    def config(self) -> dict[str, Any]:
        """Keyword arguments that make an equal pattern."""
        return {**self._levels, "beta": self.beta}
