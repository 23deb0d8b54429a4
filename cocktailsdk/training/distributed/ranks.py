"""The processes of a run, and what they tell each other.

All of a run's code asks :class:`Ranks`, whose own methods are those of one process alone, and does without
:mod:`torch.distributed`; :class:`ProcessRanks` answers for several.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from ...errors import TrainingError

__all__ = ["SINGLE", "ProcessRanks", "Ranks", "digest"]

log = logging.getLogger(__name__)

T = TypeVar("T")


class Ranks:
    """One process, which agrees with itself.

    Attributes:
        rank: This process's number, from 0.
        world: How many there are.
    """

    rank: int = 0
    world: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process decides, logs and writes."""
        return self.rank == 0

    def rows(self, count: int) -> range:
        """Which of so many examples in a row are this process's; shares differ by one at most."""
        return range(count * self.rank // self.world, count * (self.rank + 1) // self.world)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, the same bits on each; may be the tensor itself, changed."""
        return tensor

    def any(self, flag: bool) -> bool:
        """Whether it holds in any process."""
        return flag

    def least(self, value: int) -> int:
        """The least of all processes' values."""
        return value

    def from_main(self, function: Callable[[], T]) -> T:
        """What a function returns in the main process, where alone it runs; so its errors are raised in all."""
        return function()

    def tensor(self, value: Tensor | None) -> Tensor:
        """The main process's tensor; others may give ``None``. On the CPU if there are several processes."""
        assert value is not None
        return value

    def align(self, tensors: Iterable[Tensor]) -> None:
        """Give tensors the main process's values, in place."""

    def verify(self, what: str, value: Callable[[], str]) -> None:
        """Make sure that a digest is the same everywhere.

        Raises:
            TrainingError: It is not; names what.
        """


SINGLE = Ranks()


class ProcessRanks(Ranks):
    """The processes of the default group of :mod:`torch.distributed`.

    Every method must be called by all processes, in the same order.

    Args:
        device: Where this process computes.
    """

    def __init__(self, device: torch.device) -> None:
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.device = device
        # Words and decisions are on the host: through a group of its own they do not wait for the device.
        talks = "gloo" in dist.get_backend() or not dist.is_gloo_available()
        self._words: Any = dist.group.WORLD if talks else dist.new_group(backend="gloo")
        self._host = torch.device("cpu") if dist.is_gloo_available() else device

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes."""
        dist.all_reduce(tensor, group=self._words if tensor.device == self._host else None)
        return tensor

    def any(self, flag: bool) -> bool:
        """Whether it holds in any process."""
        return -self.least(-int(flag)) > 0

    def least(self, value: int) -> int:
        """The least of all processes' values."""
        word = torch.tensor(value, device=self._host)
        dist.all_reduce(word, dist.ReduceOp.MIN, group=self._words)
        return int(word)

    def from_main(self, function: Callable[[], T]) -> T:
        """What a function returns in the main process."""
        answer: list[Any] = [None, None]
        failure: Exception | None = None
        if self.is_main:
            try:
                answer[0] = function()
            except Exception as error:
                failure = error
                answer[1] = f"{type(error).__name__}: {error}" if not isinstance(error, TrainingError) else str(error)
        dist.broadcast_object_list(answer, src=0, group=self._words, device=self._host)
        if failure is not None:
            raise failure
        if answer[1] is not None:
            raise TrainingError(answer[1])
        value: T = answer[0]
        return value

    def tensor(self, value: Tensor | None) -> Tensor:
        """The main process's tensor, on the CPU."""
        kind = self.from_main(lambda: None if value is None else (value.dtype, tuple(value.shape)))
        assert kind is not None
        dtype, shape = kind
        out = torch.empty(shape, dtype=dtype) if value is None or not self.is_main else value.detach().cpu()
        # bytes, since backends do not know every dtype
        flat = out.contiguous().reshape(-1).view(torch.uint8).to(self._host)
        if flat.numel():
            dist.broadcast(flat, 0, group=self._words)
        return out if self.is_main else flat.cpu().view(dtype).reshape(shape)

    def align(self, tensors: Iterable[Tensor]) -> None:
        """Give tensors the main process's values, in place."""
        for tensor in tensors:
            tensor.copy_(self.tensor(tensor if self.is_main else None))

    def verify(self, what: str, value: Callable[[], str]) -> None:
        """Make sure that a digest is the same everywhere."""
        mine = value()
        other = self.from_main(lambda: mine)
        if self.any(mine != other):
            raise TrainingError(
                f"{what} are not the same in all {self.world} processes{'' if mine == other else ' (here other)'}: "
                "all must build the same model and data, and run the same code on alike devices"
            )


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of tensors' names and bits."""
    out = hashlib.sha256()
    for name, tensor in tensors.items():
        out.update(name.encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        if flat.numel():
            # As bytes: NumPy has no bfloat16, and -0.0 and 0.0 are to differ.
            out.update(flat.view(torch.uint8).numpy().data)
    return out.hexdigest()
