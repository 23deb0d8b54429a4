"""Weights without the rows and columns of removed units: what the slim model will hold."""

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
        """Along each axis the positions that stay; ``None`` where no slice holds exactly the elements that stay."""
        keep = self._keep.get(weight.name)
        if keep is None:
            return tuple(torch.arange(n) for n in weight.shape)
        keep = keep.reshape((1,) * (len(weight.shape) - keep.ndim) + keep.shape)
        along = []
        for d in range(keep.ndim):  # a position stays if anything at it does
            others = [k for k in range(keep.ndim) if k != d]
            stays = keep.amax(others) if others else keep
            along.append(stays.expand(weight.shape[d]) if stays.numel() == 1 else stays)
        # The slice of these positions has every combination of them, so it must be their outer product: of rows
        # [1, 0] and columns [1, 1] it is [[1, 1], [0, 0]]. Units that touch single elements give other masks.
        product = torch.ones_like(keep)
        for d, stays in enumerate(along):
            shape = [1] * keep.ndim
            shape[d] = keep.shape[d]
            product &= (stays if keep.shape[d] > 1 else stays[:1]).reshape(shape)
        return tuple(stays.nonzero().flatten() for stays in along) if torch.equal(product, keep) else None

    def hidden(self, weight: Weight) -> Bool[Tensor, "..."] | None:
        """The elements that units remove where no slice does; ``None`` where :meth:`slice` removes them all."""
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
        for d, stays in enumerate(positions or ()):
            if stays.numel() < tensor.shape[d]:
                tensor = tensor.index_select(d, stays.to(tensor.device))
        return tensor

    def spread(self, weight: Weight, part: Bool[Tensor, "..."]) -> Bool[Tensor, "..."]:
        """A mask of what is left as one of the whole weight, False where channels are gone."""
        positions = self.positions(weight)
        if positions is None:
            return part & self._keep[weight.name]
        for d, stays in enumerate(positions):
            if stays.numel() < weight.shape[d]:
                wide = part.new_zeros((*part.shape[:d], weight.shape[d], *part.shape[d + 1 :]))
                part = wide.index_copy_(d, stays.to(part.device), part)
        return part
