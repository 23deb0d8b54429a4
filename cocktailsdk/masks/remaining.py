"""What is left of weights once channel units are sliced away: what the slim model will hold."""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from ..graph import Coupling, Weight

__all__ = ["Remaining"]


class Remaining:
    """Weights as they are in the slim model.

    Args:
        coupling: The model's coupling.
        removed: For each channel unit whether it goes.
    """

    def __init__(self, coupling: Coupling, removed: Bool[Tensor, " units"]) -> None:
        self._keep = coupling.left(removed)

    def positions(self, weight: Weight) -> tuple[Int64[Tensor, " left"], ...] | None:
        """Along each axis the positions that stay; ``None`` where no slice can hold what stays, so that all does."""
        keep = self._keep.get(weight.name)
        if keep is None:
            return tuple(torch.arange(n) for n in weight.shape)
        keep = keep.reshape((1,) * (len(weight.shape) - keep.ndim) + keep.shape)
        along = []
        for d in range(keep.ndim):
            others = [k for k in range(keep.ndim) if k != d]
            left = keep.amax(others) if others else keep
            along.append(left.expand(weight.shape[d]) if left.numel() == 1 else left)
        whole = torch.ones_like(keep)
        for d, left in enumerate(along):
            shape = [1] * keep.ndim
            shape[d] = keep.shape[d]
            whole &= (left if keep.shape[d] > 1 else left[:1]).reshape(shape)
        return tuple(left.nonzero().flatten() for left in along) if torch.equal(whole, keep) else None

    def hidden(self, weight: Weight) -> Bool[Tensor, "..."] | None:
        """What units take of a weight that :meth:`slice` leaves whole; ``None`` where it slices all of that away."""
        if self.positions(weight) is not None:
            return None
        return ~self._keep[weight.name].expand(weight.shape)

    def weight(self, weight: Weight) -> Weight:
        """The weight with the shape and the convolution groups that are left."""
        positions = self.positions(weight)
        if positions is None:
            return weight
        shape = tuple(p.numel() for p in positions)
        groups = weight.groups
        if groups > 1:
            first = weight.shape[0]
            if weight.op == "conv_transpose" and groups == first:  # depthwise: groups go with their channels
                groups = shape[0]
            elif weight.op == "conv" and weight.shape[weight.in_axis] == 1:
                groups = shape[0] // (first // groups)
        return replace(weight, shape=shape, groups=groups)

    def slice(self, weight: Weight, tensor: Tensor) -> Tensor:
        """What is left of a tensor of the weight's shape."""
        positions = self.positions(weight)
        for d, left in enumerate(positions or ()):
            if left.numel() < tensor.shape[d]:
                tensor = tensor.index_select(d, left.to(tensor.device))
        return tensor

    def spread(self, weight: Weight, part: Bool[Tensor, "..."]) -> Bool[Tensor, "..."]:
        """A mask of what is left as one of the whole weight, False where channels are gone."""
        positions = self.positions(weight)
        if positions is None:
            return part & self._keep[weight.name]
        for d, left in enumerate(positions):
            if left.numel() < weight.shape[d]:
                wide = part.new_zeros((*part.shape[:d], weight.shape[d], *part.shape[d + 1 :]))
                part = wide.index_copy_(d, left.to(part.device), part)
        return part
