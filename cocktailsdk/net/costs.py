"""What each subnetwork holds and costs."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from ..graph import Contraction, Coupling
from ..masks import Mask


@dataclass(frozen=True)
class SubnetReport:
    """One subnetwork in numbers.

    Attributes:
        name: ``"dense"``, ``"unstructured@0.488"``, ``"2:4"``, ``"channel@0.271"``.
        pattern: The registered name of its pattern, or ``"dense"``.
        sparsity: The sparsity asked for.
        sparsity_exact: The sparsity its mask has, by the pattern's definition.
        params: Parameters kept: those not masked.
        flops: FLOPs (2 x multiply-adds) of one forward pass on the example inputs as a dense kernel runs them, once
            removed channels are sliced away and the modules of dropped residual branches taken out.
        nonzero_macs: Multiply-adds by weights that are not masked.
        metric: The metric set for it, if any.
        coverage: Share of the eligible weights that the pattern can touch at all.
    """

    name: str
    pattern: str
    sparsity: float
    sparsity_exact: float
    params: int
    flops: int
    nonzero_macs: int
    metric: float | None = None
    coverage: float = 1.0


def params_kept(coupling: Coupling, mask: Mask) -> int:
    """Parameters that the mask leaves, tied ones once."""
    total = coupling.params()
    for name, keep in mask.left(coupling).items():
        if name in coupling.shapes:
            share = math.prod(coupling.shapes[name]) // keep.numel()
            total -= int((~keep).sum()) * share
    return total


def flops_left(coupling: Coupling, mask: Mask) -> int:
    """FLOPs of the slim model."""
    return replace(coupling, contractions=_run(coupling, mask)).flops(mask.removed)


def _run(coupling: Coupling, mask: Mask) -> tuple[Contraction, ...]:
    """The products that are left once the modules of dropped branches are gone."""
    gone = tuple(path for b in mask.dropped(coupling) for path in b.modules)
    return tuple(c for c in coupling.contractions if not any(f"{c.module}.".startswith(f"{path}.") for path in gone))


def nonzero_macs(coupling: Coupling, mask: Mask) -> int:
    """Multiply-adds that are left when those by masked weights are not counted.

    A weight's elements are used equally often, border effects of padding aside, which dense kernels run too.
    """
    kept = mask.left(coupling)
    gone = None if mask.removed is None else torch.cat([mask.removed, torch.zeros(1, dtype=torch.bool)])
    total = 0
    for c in _run(coupling, mask):
        left, whole = c.macs, 1
        if c.weight in kept:
            left, whole = left * int(kept[c.weight].sum()), kept[c.weight].numel()
        elif gone is not None:
            for units in c.factors:
                left, whole = left * int((~gone[units]).sum()), whole * units.numel()  # STAYS indexes the last
        total += left // whole
    return total
