"""How many parameters hold all networks of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ..masks import Mask
from ..net.costs import remaining_params
from ..net.subnet_model import SubnetModel
from ..patterns.base import DENSE

__all__ = ["parameter_count"]


def parameter_count(net: SubnetModel, own: Mapping[str, str]) -> int:
    """Parameters of all sets of weights: those of the model where all networks share one.

    A set that only sparse networks use counts what any of them keeps.

    Args:
        net: The networks and their masks.
        own: By network the set that it has for its own; the others share one.
    """
    shared = [name for name in [DENSE, *net.masks] if name not in own]
    sets = [shared] if shared else []
    sets += [[name for name in own if own[name] == where] for where in dict.fromkeys(own.values())]
    total = 0
    for names in sets:
        mask = Mask() if DENSE in names else any_of([net.masks[name] for name in names])
        total += remaining_params(net.coupling, mask)
    return total


def any_of(masks: Sequence[Mask]) -> Mask:
    """What any of several masks keeps."""
    shared = set(masks[0].elements).intersection(*(mask.elements for mask in masks))
    elements = {n: torch.stack([m.elements[n] for m in masks]).any(0) for n in masks[0].elements if n in shared}
    removed = [mask.removed for mask in masks if mask.removed is not None]
    return Mask(elements, torch.stack(removed).all(0) if len(removed) == len(masks) else None)
