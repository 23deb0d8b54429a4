"""The importance of every unit, for ``slim``."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float64
from torch import Tensor, nn

from ..errors import PatternError
from ..graph import Coupling
from ..graph.weight_graph import run_weight_graph
from ..patterns.base import UMG
from ..patterns.unit_choice import comparable
from ..patterns.unit_scores import unit_scores

__all__ = ["Importance", "scores_of"]

MAGNITUDE = "magnitude"

Importance = str | Callable[[UMG], Tensor]
"""``"magnitude"``, or a function of the coupling and the model's tensors that returns a score for each unit."""


def scores_of(model: nn.Module, coupling: Coupling, importance: Importance, scope: str) -> Float64[Tensor, " units"]:
    """The importance of every unit, comparable among the units that are ranked together.

    Magnitudes (:func:`cocktailsdk.patterns.unit_scores.unit_scores`) are divided by their mean over the group where
    groups are compared with one another. What a function returns is taken as it is.

    Raises:
        PatternError: A function returned something else than one finite number for each unit.
    """
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    graphs = coupling.trace.computed if coupling.trace is not None else {}
    values = {name: p.detach() for name, p in model.named_parameters()}
    values |= {name: run_weight_graph(graph, tensors.__getitem__) for name, graph in graphs.items()}
    umg = UMG(coupling, (), values)
    if callable(importance):
        custom = importance(umg)
        expected_shape = (coupling.n_units,)
        if not isinstance(custom, Tensor) or tuple(custom.shape) != expected_shape:
            found = f"shape {list(custom.shape)}" if isinstance(custom, Tensor) else f"a {type(custom).__name__}"
            raise PatternError(
                f"importance must return a tensor of shape {list(expected_shape)}, one score a unit, not {found}"
            )
        scores = custom.detach().cpu().to(torch.float64)
        if not bool(torch.isfinite(scores).all()):
            raise PatternError("importance returned scores that are not finite")
        return scores
    scores = unit_scores(umg, 1.0)
    return comparable(scores, coupling.groups) if scope == "global" else scores
