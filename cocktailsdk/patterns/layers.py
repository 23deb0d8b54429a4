"""Layers: whole blocks go, attention and MLP together, so that the next block reads what the last one kept wrote."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import torch

from ..errors import PatternError
from ..graph import Coupling, Weight
from ..masks import Mask
from .base import UMG, Pattern, Subnet, checked_sparsities
from .checking import covered_share, refuse
from .depth import branch_scores
from .registry import register_pattern
from .unit_scores import checked_beta
from .whole_layers import WholeLayer, dropped_layers, elements_around, layers_of, removable_layers

__all__ = ["Layers", "layer_scores"]


def layer_scores(umg: UMG, layers: Sequence[WholeLayer], beta: float) -> list[float]:
    """How much each layer does: what ``UMG.layer_scores`` says of its path, or the mean of its branches' scores.

    See :func:`cocktailsdk.patterns.depth.branch_scores`.
    """
    given = umg.layer_scores or {}
    return [
        given[layer.path] if layer.path in given else fmean(branch_scores(umg, layer.branches, beta))
        for layer in layers
    ]


@register_pattern("layers")
class Layers(Pattern):
    """Drops the same share of whole layers, nested over its levels.

    A layer is an element of a ``ModuleList`` or ``Sequential`` whose parameters all belong to its residual branches: a
    pre-norm transformer block with its attention and MLP, a residual block whose shortcut is the identity. Its branches
    are masked, so that it adds exactly nothing. Of n layers of eligible weights exactly ``round(sparsity * n)`` go,
    never all; those of least score (:meth:`scores`), ties by position. ``net.slim`` takes the elements out of their
    list, where the model's code allows it.

    Args:
        sparsities: Ascending, in [0, 1]; by default ``1 - (1 - rate)^k`` for k = 1 … rounds. The defaults end at a
            quarter of the layers: without training, language models break beyond that.
        rounds: Number of default levels.
        rate: Share of the kept layers that each default level removes.
        beta: Weight of the unstructured term in the score; the N:M term has the rest.

    Raises:
        PatternError: An argument makes no sense; when masks are made, that no whole layer can go.
    """

    after = ("unstructured", "n:m")
    ranks = "layers"

    def __init__(
        self, sparsities: Sequence[float] | None = None, rounds: int = 3, rate: float = 0.1, beta: float = 0.8
    ) -> None:
        self.sparsities, self._subnets, self._levels = checked_sparsities(self.name, sparsities, rounds, rate)
        self.beta = checked_beta(self.name, beta)

    def subnets(self) -> tuple[Subnet, ...]:
        """Its subnetworks, from the deepest to the shallowest."""
        return self._subnets

    def scores(self, umg: UMG, layers: Sequence[WholeLayer]) -> list[float]:
        """A score for each layer; those of least score go. Override this to rank layers otherwise."""
        return layer_scores(umg, layers, self.beta)

    def mask(self, subnet: Subnet, umg: UMG) -> Mask:
        """The layers of least score go."""
        layers = removable_layers(umg.coupling, umg.eligible)
        if not layers:
            raise PatternError(f"{subnet.name!r}: {_nothing(umg.coupling)}")
        before = {layer.path for layer in dropped_layers(umg.previous, umg.coupling, layers)}
        scores = self.scores(umg, layers)
        order = sorted(range(len(layers)), key=lambda i: (layers[i].path not in before, scores[i], i))
        gone = [layers[i] for i in sorted(order[: max(len(before), _count(subnet, layers))])]
        if not gone:  # said in so many words: no unit and no layer goes
            return Mask(removed=torch.zeros(umg.coupling.n_units, dtype=torch.bool))
        shapes = umg.coupling.shapes
        return Mask({t: torch.zeros(shapes[t], dtype=torch.bool) for layer in gone for t in layer.tensors})

    def droppable(self, coupling: Coupling, eligible: Sequence[Weight]) -> Mapping[str, tuple[str, ...]]:
        """The layers that may go."""
        return {layer.path: layer.tensors for layer in removable_layers(coupling, eligible)}

    def exact_sparsity(self, subnet: Subnet, mask: Mask, umg: UMG) -> float:
        """Dropped layers among all that may go."""
        del subnet
        layers = removable_layers(umg.coupling, umg.eligible)
        return len(dropped_layers(mask, umg.coupling, layers)) / len(layers) if layers else 0.0

    def check(self, subnet: Subnet, mask: Mask, umg: UMG) -> None:
        """Exactly as many layers go as asked for, each as a whole, and nothing else is masked.

        Raises:
            PatternError: It is not so.
        """
        if mask.removed is not None and bool(mask.removed.any()):
            refuse(subnet, "channel units are removed, and the pattern removes none")
        layers = removable_layers(umg.coupling, umg.eligible)
        gone = dropped_layers(mask, umg.coupling, layers)
        odd = set(mask.elements).difference(*(layer.tensors for layer in gone))
        if odd or any(bool(keep.any()) for keep in mask.elements.values()):
            refuse(subnet, f"{min(odd or mask.elements)!r} is masked, but no layer is that holds it")
        if len(gone) != _count(subnet, layers):
            refuse(subnet, f"{len(gone)} of the {len(layers)} layers are dropped, not {_count(subnet, layers)}")

    def coverage(self, subnet: Subnet, mask: Mask, umg: UMG) -> float:
        """The share of the eligible weights that lie in layers."""
        del subnet, mask
        within = {t for layer in removable_layers(umg.coupling, umg.eligible) for t in layer.tensors}
        return covered_share(umg, lambda weight: weight.numel if weight.name in within else 0)

    def config(self) -> dict[str, Any]:
        """Keyword arguments that make an equal pattern."""
        return {**self._levels, "beta": self.beta}


def _count(subnet: Subnet, layers: Sequence[WholeLayer]) -> int:
    return min(round(subnet.sparsity * len(layers)), max(len(layers) - 1, 0))


def _nothing(coupling: Coupling) -> str:
    """Why no whole layer can go."""
    why = "no whole layer of this model can go"
    if not coupling.branches:
        return f"{why}: it has no residual branch that ends in a sum whose other operand is the stream it starts from"
    if layers := layers_of(coupling):
        return f"{why}: its {len(layers)} layers have weights that are not eligible; 'depth' drops single branches"
    owned = {t for b in coupling.branches for t in b.tensors}
    lists = {path for t in owned for path in elements_around(t)}
    own = next((n for n in coupling.shapes if n not in owned and lists.intersection(elements_around(n))), None)
    reason = (
        f"{own!r} in its lists belongs to no single residual branch"
        if own
        else "its residual branches are no elements of a ModuleList or Sequential"
    )
    return f"{why}: {reason}; 'depth' drops single branches"
