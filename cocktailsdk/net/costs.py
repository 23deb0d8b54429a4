"""Parameters, FLOPs and multiply-adds of each subnetwork."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..graph import Contraction, Coupling
from ..masks import Mask
from ..patterns.base import DENSE
from .private import kept_elements


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
        private_bytes: Bytes of its private tensors, without what its mask sets to zero: what a bundle holds of them.
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
    private_bytes: int = 0


def remaining_params(coupling: Coupling, mask: Mask) -> int:
    """Parameters that are not masked, tied ones once."""
    total = coupling.params()
    for name, keep in mask.left(coupling).items():
        if name in coupling.shapes:
            # A mask may have size 1 along axes to which it broadcasts: each of its elements then masks several weights.
            broadcast = math.prod(coupling.shapes[name]) // keep.numel()
            total -= int((~keep).sum()) * broadcast
    return total


def private_bytes(coupling: Coupling, mask: Mask, private: Mapping[str, Tensor]) -> int:
    """Bytes of a subnetwork's private tensors, without what its mask sets to zero."""
    counts = kept_elements(private, mask, coupling)
    return sum(counts[n] * t.element_size() for n, t in private.items())


def stored_params(
    coupling: Coupling,
    masks: Mapping[str, Mask],
    own: Mapping[str, str],
    private: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> int:
    """Parameters of all sets of weights: those of the model where all networks share one; and private tensors.

    A set that only sparse networks use counts what any of them keeps.

    Args:
        coupling: Of the model.
        masks: By network.
        own: By network the set that it has for its own; the others share one.
        private: Private tensors by network and parameter name.
    """
    shared = [name for name in [DENSE, *masks] if name not in own]
    sets = [shared] if shared else []
    sets += [[name for name in own if own[name] == where] for where in dict.fromkeys(own.values())]
    total = sum(sum(kept_elements(of, masks[name], coupling).values()) for name, of in (private or {}).items())
    for names in sets:
        mask = Mask() if DENSE in names else _any_of([masks[name] for name in names])
        total += remaining_params(coupling, mask)
    return total


def _any_of(masks: Sequence[Mask]) -> Mask:
    """What any of several masks keeps."""
    shared = set(masks[0].elements).intersection(*(mask.elements for mask in masks))
    elements = {n: torch.stack([m.elements[n] for m in masks]).any(0) for n in masks[0].elements if n in shared}
    removed = [mask.removed for mask in masks if mask.removed is not None]
    sets = set(masks[0].experts).intersection(*(mask.experts for mask in masks))
    experts = {n: torch.stack([m.experts[n] for m in masks]).all(0) for n in sets}
    return Mask(elements, torch.stack(removed).all(0) if len(removed) == len(masks) else None, experts)


def slim_flops(coupling: Coupling, mask: Mask) -> int:
    """FLOPs of the slim model."""
    return replace(coupling, contractions=_remaining_contractions(coupling, mask)).flops(mask.removed)


def _remaining_contractions(coupling: Coupling, mask: Mask) -> tuple[Contraction, ...]:
    """The products that a slim model computes: all but those in the modules of dropped branches.

    Each token goes to as many experts as ever, whatever experts are removed; only their router has fewer outputs.
    """
    dropped = tuple(path for b in mask.dropped(coupling) for path in b.modules)
    remaining = (c for c in coupling.contractions if not any(f"{c.module}.".startswith(f"{path}.") for path in dropped))
    kept = {
        s.router: s.count - int(gone.sum()) for s in coupling.experts if (gone := mask.experts.get(s.name)) is not None
    }
    counts = {s.router: s.count for s in coupling.experts}
    return tuple(
        replace(c, macs=c.macs * kept[c.weight] // counts[c.weight]) if c.weight in kept else c for c in remaining
    )


def nonzero_macs(coupling: Coupling, mask: Mask) -> int:
    """Multiply-adds by weights that are not masked.

    All elements of a weight count as used equally often. Padding would make a difference at the borders, but dense
    kernels multiply with padding, too.
    """
    masks = replace(mask, experts={}).left(coupling)
    # One more unit, which is never removed: the index STAYS (-1) finds it.
    removed = None if mask.removed is None else torch.cat([mask.removed, torch.zeros(1, dtype=torch.bool)])
    total = 0
    for c in _remaining_contractions(coupling, mask):
        # One exact integer division at the end of each product; rounding factor by factor would add up.
        numerator, denominator = c.macs, 1
        if c.weight in masks:
            numerator, denominator = numerator * int(masks[c.weight].sum()), masks[c.weight].numel()
        elif removed is not None:
            for units in c.factors:
                numerator, denominator = numerator * int((~removed[units]).sum()), denominator * units.numel()
        total += numerator // denominator
    return total
