"""What weights are multiplied with, seen where it happens.

A dispatch mode sees every operation that torch runs, below autograd and whatever module code called it. A weight is
recognised by its memory. So layers that call functions instead of modules (attention with packed projections, experts
in one tensor) are seen as well as plain linear layers, and nothing is attached to the user's model that might stay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from ..graph import Weight
from ..patterns.scores.matrices import parts_of

__all__ = ["InputObserver"]

aten = torch.ops.aten

Receive = Callable[[str, int, Float[Tensor, "rows features"]], None]
"""Called with a weight's name, which of its parts, and the input rows that the part is multiplied with."""


class InputObserver(TorchDispatchMode):
    """Hands on the inputs of weights while it is active.

    Args:
        weights: The weights.
        tensors: Their values by name, as the model uses them.
        receive: Gets the inputs, in the order in which the model computes.
    """

    def __init__(self, weights: Iterable[Weight], tensors: Mapping[str, Tensor], receive: Receive) -> None:
        super().__init__()
        self._receive = receive
        self._by_memory: dict[int, list[tuple[Weight, Tensor]]] = {}
        for weight in weights:
            tensor = tensors[weight.name].detach()
            self._by_memory.setdefault(_memory(tensor), []).append((weight, tensor))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Look at products, and run them."""
        handler = _HANDLERS.get(func.overloadpacket)
        if handler is not None:
            handler(self, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _found(self, tensor: Tensor) -> tuple[Weight, Tensor] | None:
        """The weight that a tensor is a view of."""
        for weight, whole in self._by_memory.get(_memory(tensor), ()):
            begin = whole.storage_offset()
            if begin <= tensor.storage_offset() < begin + whole.numel():
                return weight, whole
        return None

    def _matmul(self, left: Tensor, right: Tensor) -> None:
        """``left @ right`` of two matrices; either may be the weight."""
        if (found := self._found(right)) is not None:
            self._give(*found, right, left)
        elif (found := self._found(left)) is not None:
            self._give(*found, left, right.T)

    def _addmm(self, bias: Tensor, left: Tensor, right: Tensor, **kwargs: Any) -> None:
        del bias, kwargs
        self._matmul(left, right)

    def _linear(self, inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
        del bias
        if (found := self._found(weight)) is not None:
            self._give(*found, weight, inputs.flatten(0, -2) if inputs.ndim > 1 else inputs[None])

    def _bmm(self, left: Tensor, right: Tensor) -> None:
        """Products of stacked matrices; a weight may be expanded over the batch, or hold one matrix for each."""
        if (found := self._found(right)) is not None:
            inputs = left
        elif (found := self._found(left)) is not None:
            inputs, right = right.mT, left
        else:
            return
        weight, whole = found
        if right.stride(0) == 0 or parts_of(weight) == 1:
            self._give(weight, whole, right[0], inputs.flatten(0, 1))
        else:
            for i in range(right.shape[0]):
                self._give(weight, whole, right[i], inputs[i])

    def _baddbmm(self, bias: Tensor, left: Tensor, right: Tensor, **kwargs: Any) -> None:
        del bias, kwargs
        self._bmm(left, right)

    def _grouped_mm(self, left: Tensor, right: Tensor, offs: Tensor | None = None, *rest: Any, **kwargs: Any) -> None:
        """Rows of the left side in runs that end at ``offs``, each with a matrix of its own."""
        del rest, kwargs
        found = self._found(right)
        if found is None or offs is None or right.ndim != 3:
            return
        begin = 0
        for i, end in enumerate(offs.tolist()):
            self._give(*found, right[i], left[begin:end])
            begin = end

    def _convolution(
        self, inputs: Tensor, weight: Tensor, bias: Any, stride: Any, padding: Any, dilation: Any, transposed: bool,
        *rest: Any,
    ) -> None:  # fmt: skip
        del bias, rest
        found = self._found(weight)
        if found is None:
            return
        groups = found[0].groups
        if transposed:
            rows = (
                inputs.flatten(2).unflatten(1, (groups, -1)).permute(1, 0, 3, 2)
            )  # groups, batch, positions, channels
        else:
            rows = _lowered(inputs, tuple(weight.shape[2:]), stride, padding, dilation, groups)
        for part in range(groups):
            self._receive(found[0].name, part, rows[part].flatten(0, -2))

    def _give(self, weight: Weight, whole: Tensor, view: Tensor, inputs: Tensor) -> None:
        parts = parts_of(weight)
        part = 0
        if parts > 1:  # stacked along the first axis
            part = int(view.storage_offset() - whole.storage_offset()) // max(1, whole.numel() // parts)
        if inputs.shape[-1] == weight.shape[weight.in_axis]:
            self._receive(weight.name, part, inputs)


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _lowered(
    inputs: Tensor, kernel: tuple[int, ...], stride: Any, padding: Any, dilation: Any, groups: int
) -> Float[Tensor, "groups batch positions features"]:
    """What a convolution multiplies its kernel with, features by kernel position, then by channel."""
    pad = [p for n in reversed(list(padding)) for p in (n, n)]
    x = F.pad(inputs, pad) if any(pad) else inputs
    for axis, (size, step, spread) in enumerate(zip(kernel, stride, dilation, strict=True), start=2):
        x = x.unfold(axis, (size - 1) * spread + 1, step)[..., ::spread]
    spatial = len(kernel)
    # batch, channels, positions …, kernel … -> groups, batch, positions, kernel positions and channels
    x = x.flatten(2, 1 + spatial).flatten(3)
    x = x.unflatten(1, (groups, -1)).permute(1, 0, 3, 4, 2)
    return x.flatten(3)


_HANDLERS: dict[Any, Callable[..., None]] = {
    aten.mm: InputObserver._matmul,
    aten.addmm: InputObserver._addmm,
    aten.linear: InputObserver._linear,
    aten.bmm: InputObserver._bmm,
    aten.baddbmm: InputObserver._baddbmm,
    aten._grouped_mm: InputObserver._grouped_mm,
    aten.convolution: InputObserver._convolution,
}
