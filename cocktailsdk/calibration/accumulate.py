"""Sums over what was observed."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import PatternError
from ..graph import Weight
from ..patterns.scores.base import Observed

__all__ = ["InputSums"]


class InputSums:
    """Sums of squares of inputs, and of their products, by weight. Receives from an :class:`InputObserver`.

    Args:
        gram: Names of the weights of which products are summed too.
    """

    def __init__(self, gram: Iterable[str] = ()) -> None:
        self._wants_gram = frozenset(gram)
        self._rows: dict[str, dict[int, int]] = {}
        self._squares: dict[str, dict[int, Tensor]] = {}
        self._grams: dict[str, dict[int, Tensor]] = {}

    def __call__(self, name: str, part: int, inputs: Float[Tensor, "rows features"]) -> None:
        """Add inputs of a weight's part."""
        x = inputs.detach()
        x = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
        rows = self._rows.setdefault(name, {})
        rows[part] = rows.get(part, 0) + x.shape[0]
        if name in self._wants_gram:
            _add(self._grams.setdefault(name, {}), part, x.T @ x)
        else:
            _add(self._squares.setdefault(name, {}), part, x.square().sum(0))

    def of(self, weight: Weight, parts: int) -> Observed | None:
        """What was observed of a weight; ``None`` if it was never used. Parts without inputs have sums of 0.

        Raises:
            PatternError: An input is infinite or NaN.
        """
        rows = self._rows.get(weight.name)
        if rows is None:
            return None
        gram = self._stacked(self._grams.get(weight.name), parts)
        squares = self._stacked(self._squares.get(weight.name), parts)
        if gram is not None:
            squares = gram.diagonal(dim1=-2, dim2=-1)
        assert squares is not None
        if not bool(squares.isfinite().all()):
            raise PatternError(
                f"calibration: inputs of {weight.name!r} are infinite or NaN; calibrate in a wider dtype (float32 or "
                "bfloat16), or look for the first module whose output is not finite"
            )
        return Observed(tuple(rows.get(part, 0) for part in range(parts)), squares, gram)

    def _stacked(self, sums: dict[int, Tensor] | None, parts: int) -> Tensor | None:
        if sums is None:
            return None
        empty = torch.zeros_like(next(iter(sums.values())))
        return torch.stack([sums.get(part, empty) for part in range(parts)])


def _add(sums: dict[int, Tensor], part: int, value: Tensor) -> None:
    if part in sums:
        sums[part] += value
    else:
        sums[part] = value
