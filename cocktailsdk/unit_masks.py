"""Masks of channel units by the positions that go, for large models on the CPU."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from .graph import Coupling

__all__ = ["UnitMasks"]


class UnitMasks(Mapping[str, Bool[Tensor, "..."]]):
    """What removed units mask: rows and columns of each tensor, which are few, where its elements are many.

    Args:
        coupling: The model's; along every axis of a tensor its units lie apart (:meth:`fits`).
        removed: For each unit whether it goes.
    """

    device = torch.device("cpu")

    def __init__(self, coupling: Coupling, removed: Bool[Tensor, " units"]) -> None:
        gone = torch.cat([removed, torch.zeros(1, dtype=torch.bool)])  # the last: of no unit
        self._gone: dict[str, list[tuple[int, int, Int64[Tensor, " gone"]]]] = {}
        self._dims: dict[str, int] = {}
        for name, fields in coupling.fields.items():
            found = []
            for units in fields:
                axis = next((d for d, n in enumerate(units.shape) if n > 1), 0)
                positions = gone[units.flatten()].nonzero().flatten()
                if len(positions):
                    found.append((axis, units.numel(), positions))
            if found:
                self._gone[name], self._dims[name] = found, fields[0].dim()

    @staticmethod
    def fits(coupling: Coupling) -> bool:
        """Whether every field of units varies along one axis."""
        fields = (units for of in coupling.fields.values() for units in of)
        return all(sum(n > 1 for n in units.shape) <= 1 for units in fields)

    def __getitem__(self, name: str) -> Bool[Tensor, "..."]:
        out = torch.ones((), dtype=torch.bool)
        for axis, n, positions in self._gone[name]:
            keep = torch.ones(n, dtype=torch.bool)
            keep[positions] = False
            shape = [1] * self._dims[name]
            shape[axis] = n
            out = out & keep.view(shape)
        return out

    def __iter__(self) -> Iterator[str]:
        return iter(self._gone)

    def __len__(self) -> int:
        return len(self._gone)

    def __contains__(self, name: object) -> bool:
        return name in self._gone

    @property
    def nbytes(self) -> int:
        """Bytes that the positions take."""
        return sum(positions.nbytes for found in self._gone.values() for _, _, positions in found)

    def zero_masked(self, tensors: Mapping[str, Tensor], into: Mapping[str, Tensor] | None = None) -> None:
        """Set to zero what is masked in those of the tensors that have a mask here.

        Args:
            tensors: By name.
            into: Where the results go, tensors of the same shapes, strides and dtypes; ``None`` for in place.
        """
        with torch.inference_mode(False), torch.no_grad():
            for name, found in self._gone.items():
                if name in tensors:
                    out = tensors[name].detach()
                    if into is not None:
                        out = into[name].detach().copy_(out)
                    for axis, n, positions in found:
                        if n == 1:  # whatever the axis: all of it goes
                            out.zero_()
                        else:
                            out.index_fill_(axis, positions, 0)
