"""A frozen teacher: the model with the weights and statistics that a run started from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ...net.switcher import forget_derived
from ...utils.fsdp import is_sharded, local, rows_of
from ...utils.modes import evaluating

__all__ = ["FrozenTeacher"]


class FrozenTeacher:
    """Weights and buffers beside a model's, put in their place for a pass.

    No second model is built: whatever the user's code does with the model (hooks, a ``forward_fn`` that calls parts of
    it) happens to the teacher too. On the CPU only addresses are exchanged. Elsewhere values are copied, because CUDA
    graphs and FSDP2 have the addresses of the model's own memory built in.

    Args:
        model: The user's own, its dense weights in place.
        tensors: The teacher's values by parameter and buffer name. Those of parameters that do not train are not kept.
    """

    def __init__(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        self._model = model
        changing = [*((n, p) for n, p in model.named_parameters() if p.requires_grad), *model.named_buffers()]
        self._pairs = [(tensor, _own(tensors[name], tensor)) for name, tensor in changing]
        self._swappable = all(t.device.type == "cpu" and not is_sharded(t) for t, _ in self._pairs)

    @property
    def nbytes(self) -> int:
        """Bytes of the copy."""
        return sum(value.nbytes for _, value in self._pairs)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Inside, the model has the teacher's weights and is in evaluation mode. No gradients are computed inside."""
        forget_derived()
        swap = self._exchanged if self._swappable else self._copied
        try:
            with torch.no_grad(), evaluating(self._model), swap():
                yield
        finally:
            forget_derived()

    @contextmanager
    def _exchanged(self) -> Iterator[None]:
        before = [(tensor, tensor.data) for tensor, _ in self._pairs]
        try:
            for tensor, value in self._pairs:
                tensor.data = value
            yield
        finally:
            for tensor, data in before:
                tensor.data = data

    @contextmanager
    def _copied(self) -> Iterator[None]:
        before = [local(tensor).clone() for tensor, _ in self._pairs]
        try:
            for tensor, value in self._pairs:
                local(tensor).copy_(value)
            yield
        finally:
            for (tensor, _), value in zip(self._pairs, before, strict=True):
                local(tensor).copy_(value)


def _own(value: Tensor, like: Tensor) -> Tensor:
    """A copy of a value on a tensor's device, in its memory format; of a sharded tensor, this process's rows."""
    part, mine = local(value.detach()), local(like.detach())
    if part.shape != mine.shape:
        part = part[rows_of(like)]
    return torch.empty_like(mine).copy_(part)
