"""A frozen teacher: the model with the weights and statistics that a run started from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
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
        self._values = {name: _own(tensors[name], tensor) for name, tensor in _changing(model).items()}

    @property
    def nbytes(self) -> int:
        """Bytes of the copy."""
        return sum(value.nbytes for value in self._values.values())

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """The copy, by parameter and buffer name."""
        return self._values

    @contextmanager
    def active(self) -> Iterator[None]:
        """Inside, the model has the teacher's weights and is in evaluation mode. No gradients are computed inside."""
        # looked up anew: a wrapper (DDP, a compiler) may have replaced the model's parameters since
        tensors = _changing(self._model)
        pairs = [(tensors[name], value) for name, value in self._values.items() if name in tensors]
        plain = all(tensor.device.type == "cpu" and not is_sharded(tensor) for tensor, _ in pairs)
        forget_derived()
        try:
            with torch.no_grad(), evaluating(self._model), (_exchanged if plain else _copied)(pairs):
                yield
        finally:
            forget_derived()


Pairs = Sequence[tuple[Tensor, Tensor]]
"""The model's tensors, each with the teacher's value."""


@contextmanager
def _exchanged(pairs: Pairs) -> Iterator[None]:
    """Exchange addresses."""
    before = [(tensor, tensor.data) for tensor, _ in pairs]
    try:
        for tensor, value in pairs:
            tensor.data = value
        yield
    finally:
        for tensor, data in before:
            tensor.data = data


@contextmanager
def _copied(pairs: Pairs) -> Iterator[None]:
    """Exchange values."""
    before = [local(tensor).clone() for tensor, _ in pairs]
    try:
        for tensor, value in pairs:
            local(tensor).copy_(value)
        yield
    finally:
        for (tensor, _), value in zip(pairs, before, strict=True):
            local(tensor).copy_(value)


def _changing(model: nn.Module) -> dict[str, Tensor]:
    """What training changes, by name: parameters that require a gradient, and buffers."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return {**trained, **dict(model.named_buffers())}


def _own(value: Tensor, like: Tensor) -> Tensor:
    """A copy of a value on a tensor's device, in its memory format; of a sharded tensor, this process's rows."""
    part, mine = local(value.detach()), local(like.detach())
    if part.shape != mine.shape:
        part = part[rows_of(like)]
    return torch.empty_like(mine).copy_(part)
