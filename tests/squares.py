"""A pattern as a user would write it: square blocks of linear and convolution weights."""

from __future__ import annotations

import torch

import cocktailsdk as cocktail


@cocktail.register_pattern("square")
class Square(cocktail.Pattern):
    """Zeroes the ``size`` x ``size`` blocks of least magnitude in each weight."""

    def __init__(self, sparsities=(0.25, 0.5), size=4):
        self.sparsities, self.size = list(sparsities), size

    def subnets(self):
        return tuple(cocktail.Subnet(f"square@{s}", self.name, s) for s in self.sparsities)

    def config(self):
        return {"sparsities": self.sparsities, "size": self.size}

    def mask(self, subnet, umg):
        elements = {}
        for w in umg.eligible:
            value = umg.values[w.name].abs().flatten(1)
            rows, columns = (n // self.size for n in value.shape)
            whole = value[: rows * self.size, : columns * self.size]
            score = whole.reshape(rows, self.size, columns, self.size).sum((1, 3)).reshape(-1)
            keep = torch.ones(rows * columns, dtype=torch.bool)
            keep[score.argsort(stable=True)[: round(subnet.sparsity * keep.numel())]] = False
            mask = torch.ones_like(value, dtype=torch.bool)
            grid = keep.reshape(rows, columns).repeat_interleave(self.size, 0).repeat_interleave(self.size, 1)
            mask[: grid.shape[0], : grid.shape[1]] = grid
            elements[w.name] = mask.reshape(w.shape)
        return cocktail.Mask(elements)
