"""Masks of channel units as rows and columns that are set to zero, for large models on the CPU."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from jaxtyping import Bool
from torch import Tensor

from ..graph import Coupling
from .bits import PIECE
from .packed import number_type

__all__ = ["UnitMasks"]

_SMALL = 1 << 12  # elements up to which one fill is quicker than the work on pieces


class UnitMasks(Mapping[str, Bool[Tensor, "..."]]):
    """What removed units mask, as rows and columns of each tensor: a few thousand flags instead of millions.

    Args:
        coupling: The model's; along every axis of a tensor its units lie apart (:meth:`fits`).
        removed: For each unit whether it goes.
    """

    device = torch.device("cpu")

    def __init__(self, coupling: Coupling, removed: Bool[Tensor, " units"]) -> None:
        # A field has the unit number -1 where no unit is; as an index that is the last flag, which is False.
        gone = torch.cat([removed, torch.zeros(1, dtype=torch.bool)])
        fields = [(name, units) for name, of in coupling.fields.items() for units in of]
        flat = [units.flatten() for _, units in fields]
        parts = gone[torch.cat(flat)].split([len(units) for units in flat]) if flat else ()
        self._gone: dict[str, list[Bool[Tensor, "..."]]] = {}  # in the shape in which they broadcast to the tensor
        for (name, units), part in zip(fields, parts, strict=True):
            if part.any():
                self._gone.setdefault(name, []).append(part.view(units.shape))

    @staticmethod
    def fits(coupling: Coupling) -> bool:
        """Whether every field of units varies along one axis."""
        fields = (units for of in coupling.fields.values() for units in of)
        return all(sum(n > 1 for n in units.shape) <= 1 for units in fields)

    def __getitem__(self, name: str) -> Bool[Tensor, "..."]:
        first, *more = self._gone[name]
        for gone in more:
            first = first | gone
        return ~first

    def __iter__(self) -> Iterator[str]:
        return iter(self._gone)

    def __len__(self) -> int:
        return len(self._gone)

    def __contains__(self, name: object) -> bool:
        return name in self._gone

    @property
    def nbytes(self) -> int:
        """Bytes that they take."""
        return sum(gone.nbytes for of in self._gone.values() for gone in of)

    def zero_masked(self, tensors: Mapping[str, Tensor], into: Mapping[str, Tensor] | None = None) -> None:
        """Set to zero what is masked in those of the tensors that have a mask here.

        Args:
            tensors: By name.
            into: Where the results go, tensors of the same shapes, strides and dtypes; ``None`` for in place.
        """
        with torch.inference_mode(False), torch.no_grad():
            for name, gone in self._gone.items():
                if name in tensors:
                    tensor = tensors[name].detach()
                    _zero(tensor, gone, tensor if into is None else into[name].detach())


def _zero(tensor: Tensor, gone: list[Bool[Tensor, "..."]], out: Tensor) -> None:
    if any(part.numel() == 1 for part in gone):  # one unit for the whole tensor: all of it goes
        out.zero_()
        return
    bits = number_type(tensor)
    if bits == torch.bool or tensor.numel() <= _SMALL or not (tensor.is_contiguous() and out.is_contiguous()):
        if out is not tensor:
            out.copy_(tensor)
        for part in gone:
            out.masked_fill_(part, 0)
        return
    # An element stays where AND with its row's and its column's number leaves its bits: -1 has all bits set, 0 none.
    n = len(tensor)
    rows, columns = torch.full((n, 1), -1, dtype=bits), torch.full((1, tensor.numel() // n), -1, dtype=bits)
    for part in gone:
        keep = part.to(bits).sub_(1)  # removed is 1 - 1 = 0, kept 0 - 1 = -1
        if len(part) > 1:
            rows &= keep.view(n, 1)
        else:
            columns &= keep.expand(1, *tensor.shape[1:]).reshape(1, -1)
    at_once = max(1, PIECE // columns.numel())
    pieces = (t.view(bits).view(n, -1).split(at_once) for t in (tensor, out))
    for value, result, row in zip(*pieces, rows.split(at_once), strict=True):
        torch.bitwise_and(value, columns, out=result)
        result &= row
