"""Experts: whole experts of mixture-of-experts layers go; each token chooses among those that stay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float64
from torch import Tensor

from ..errors import PatternError
from ..graph import Coupling, ExpertSet, Weight
from ..masks import Mask
from .base import UMG, Pattern, Subnet, checked_sparsities
from .checking import covered_share, refuse
from .registry import register_pattern

__all__ = ["Experts", "expert_scores", "removable_experts"]

DEFAULT = (0.125, 0.25, 0.375, 0.5)
"""Models have 8, 16, 64 or 128 experts: of these the default levels remove whole numbers."""


def removable_experts(coupling: Coupling, eligible: Sequence[Weight]) -> tuple[ExpertSet, ...]:
    """The sets of experts of which some may go: those whose weights, the router's included, are all eligible."""
    names, weights = {w.name for w in eligible}, {w.name for w in coupling.weights}
    return tuple(s for s in coupling.experts if names.issuperset(weights.intersection(s.tensors)))


def expert_scores(umg: UMG, of: ExpertSet) -> Float64[Tensor, " experts"]:
    """How much each expert matters: the mean magnitude of its weights times the norm of its row of the router.

    Where a score of elements was chosen, the mean of that stands in place of the magnitudes. A score that scores
    experts by itself (``UMG.expert_scores``) is returned as it is.
    """
    if umg.expert_scores is not None:
        return umg.expert_scores[of.name]
    total, elements = torch.zeros(of.count, dtype=torch.float64), 0
    for weight in umg.coupling.weights:
        if weight.name in of.tensors and weight.name != of.router:
            rows = umg.ranked[weight.name].detach().flatten(1)
            total += rows.abs().sum(1, dtype=torch.float64).cpu()
            elements += rows.shape[1]
    return total / max(1, elements) * umg.values[of.router].detach().double().norm(dim=1).cpu()


@register_pattern("experts")
class Experts(Pattern):
    """Removes the same share of the experts of every mixture of experts, nested over its levels.

    While such a subnetwork is active, no token is given to a removed expert: each goes to the ``top_k`` best of those
    that stay. Of a layer's n experts exactly ``round(sparsity * n)`` go, those of least score; ties by position.
    ``net.slim`` slices them, and their rows of the router, away.

    By default an expert's score is the mean magnitude of its weights times the norm of its row of the router. With
    ``score="activation"`` and calibration data it is the router-weighted norm of its output, the mean over the tokens
    given to it (Lasby et al. 2025, "REAP the Experts").

    Args:
        sparsities: Ascending, in [0, 1]; by default an eighth, a quarter, three eighths and half of the experts.

    Raises:
        PatternError: An argument makes no sense; when masks are made, that the model has no experts that can go, or
            that fewer would stay than each token is given to.
    """

    ranks = "experts"

    def __init__(self, sparsities: Sequence[float] | None = None) -> None:
        chosen = DEFAULT if sparsities is None else sparsities
        self.sparsities, self._subnets, self._levels = checked_sparsities(self.name, chosen, 1, 0.5)

    def subnets(self) -> tuple[Subnet, ...]:
        """Its subnetworks, from the one with most experts to the one with fewest."""
        return self._subnets

    def mask(self, subnet: Subnet, umg: UMG) -> Mask:
        """The experts of least score go."""
        sets = removable_experts(umg.coupling, umg.eligible)
        if not sets:
            raise PatternError(f"{subnet.name!r}: {_nothing(umg.coupling)}")
        gone = {s.name: _least(subnet, s, umg) for s in sets}
        if not any(bool(g.any()) for g in gone.values()):  # said in so many words: no unit and no expert goes
            return Mask(removed=torch.zeros(umg.coupling.n_units, dtype=torch.bool))
        return Mask(experts=gone)

    def exact_sparsity(self, subnet: Subnet, mask: Mask, umg: UMG) -> float:
        """Removed experts among all that may go."""
        del subnet
        total = sum(s.count for s in removable_experts(umg.coupling, umg.eligible))
        return sum(int(gone.sum()) for gone in mask.experts.values()) / total if total else 0.0

    def check(self, subnet: Subnet, mask: Mask, umg: UMG) -> None:
        """Exactly as many experts of each set go as asked for, and nothing else is masked.

        Raises:
            PatternError: It is not so.
        """
        if mask.elements or (mask.removed is not None and bool(mask.removed.any())):
            refuse(subnet, "it masks single weights or channel units, and the pattern removes experts alone")
        sets = removable_experts(umg.coupling, umg.eligible)
        odd = mask.experts.keys() - {s.name for s in sets}
        if odd:
            refuse(subnet, f"experts of {min(odd)!r} are removed, whose weights are not eligible")
        for s in sets:
            found = int(mask.experts[s.name].sum()) if s.name in mask.experts else 0
            if found != round(subnet.sparsity * s.count):
                refuse(subnet, f"{found} of the {s.count} experts of {s.name!r} go, not "
                    f"{round(subnet.sparsity * s.count)}")  # fmt: skip

    def coverage(self, subnet: Subnet, mask: Mask, umg: UMG) -> float:
        """The share of the eligible weights that belong to experts or to their rows of routers."""
        del subnet, mask
        within = {t for s in removable_experts(umg.coupling, umg.eligible) for t in s.tensors}
        return covered_share(umg, lambda weight: weight.numel if weight.name in within else 0)

    def config(self) -> dict[str, Any]:
        """Keyword arguments that make an equal pattern."""
        return dict(self._levels)


def _least(subnet: Subnet, of: ExpertSet, umg: UMG) -> Tensor:
    """For each expert of a set whether it goes."""
    count = round(subnet.sparsity * of.count)
    if of.count - count < of.top_k:
        most = (of.count - of.top_k) / of.count
        raise PatternError(
            f"{subnet.name!r} removes {count} of the {of.count} experts of {of.name!r}, and each token is given to "
            f"{of.top_k} of those that stay: ask for at most {most:.4g}, as in Experts([{most:.4g}])"
        )
    before = umg.previous.experts.get(of.name) if umg.previous is not None else None
    scores = expert_scores(umg, of).tolist()
    order = sorted(range(of.count), key=lambda i: (before is None or not bool(before[i]), scores[i], i))
    gone = torch.zeros(of.count, dtype=torch.bool)
    gone[order[: max(count, int(before.sum()) if before is not None else 0)]] = True
    return gone


def _nothing(coupling: Coupling) -> str:
    """Why no expert can go."""
    if coupling.experts:
        weights = {w.name for w in coupling.weights}
        first = next(t for s in coupling.experts for t in s.tensors if t in weights)
        return (
            f"the experts of this model have weights that are not eligible, such as {first!r}: leave routers and "
            "experts out of exclude_modules"
        )
    return (
        "this model has no experts that can go: stacks of matrices among which the largest outputs of a linear layer "
        "choose. Routers that choose by a bias of their own, or by groups of experts, are not supported; 'mlp@0.5' "
        "narrows all experts alike"
    )
