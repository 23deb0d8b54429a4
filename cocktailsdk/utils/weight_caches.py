"""What torch computes from weights and keeps for a while: dropped when weights change in place."""

from __future__ import annotations

import torch
from torch.nn.utils import parametrize

__all__ = ["forget_derived"]


def forget_derived() -> None:
    """Drop weights that ``torch.autocast`` has cast and that ``torch.nn.utils.parametrize.cached`` has computed.

    Both keep what they computed from a parameter until their context ends, and do not look at it again. Inside one
    context every subnetwork would otherwise compute with the weights of the first.
    """
    torch.clear_autocast_cache()
    # There is no public way to clear this one. Where torch has it no more, `test_net_caches.py` will say so.
    cache = getattr(parametrize, "_cache", None)
    if cache:
        cache.clear()
