"""Whether somebody changed tensors while a subnetwork was active: a switch would lose that without a word."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..utils.fsdp import is_sharded

__all__ = ["Samples", "Watch", "same_values", "versions_of"]

_SMALL = 1024  # of tensors with no more bytes all are compared
_BLOCKS, _BLOCK = 4, 32  # of larger ones so many pieces of so many bytes

_version = operator.attrgetter("_version")


def versions_of(tensors: Sequence[Tensor]) -> list[int]:
    """How often each was written in place, as torch counts it. Writing through ``.data`` is not counted."""
    return list(map(_version, tensors))


class Samples:
    """A few bytes of each of some tensors on the CPU, spread over their memory.

    They show what torch does not count: values copied in through ``.data``, as merging adapters and many averages of
    weights do. Small tensors are compared whole.

    Args:
        tensors: Their memory is read; other tensors that are given the same memory later are seen as well.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._blocks = [block for t in tensors for block in _blocks(t)]
        self._values = b"".join(self._blocks)

    def unchanged(self) -> bool:
        """Whether they still have their values."""
        return b"".join(self._blocks) == self._values  # much quicker than any operation of torch on as many tensors


def _blocks(tensor: Tensor) -> list[memoryview]:
    """Pieces of a tensor's memory: all of a small one, else from its beginning, its end and between."""
    plain = tensor.device.type == "cpu" and tensor.layout == torch.strided
    if not plain or not tensor.numel() or not _dense(tensor):
        return []
    flat = tensor.detach().as_strided((tensor.numel(),), (1,), tensor.storage_offset())
    memory = flat.view(torch.uint8).numpy().data
    if len(memory) <= _SMALL:
        return [memory]
    starts = (round(i * (len(memory) - _BLOCK) / (_BLOCKS - 1)) for i in range(_BLOCKS))
    return [memory[start : start + _BLOCK] for start in starts]


class Watch:
    """What tensors were when a subnetwork became active.

    Args:
        where: By name, the table of a module and the key in it where each tensor is.
        names: Which to watch. Sharded ones, and those whose memory cannot be seen, are left out.
        samples: Whether to notice values that are written through ``.data``.
    """

    def __init__(
        self, where: Mapping[str, tuple[dict[str, Tensor], str]], names: Sequence[str], *, samples: bool
    ) -> None:
        self._places = {n: where[n] for n in names if _watched(where[n][0][where[n][1]])}
        self.tensors = {n: table[key] for n, (table, key) in self._places.items()}
        held = list(self.tensors.values())
        self._versions, self._at = versions_of(held), list(map(Tensor.data_ptr, held))
        self._samples = Samples(held if samples else [])

    def untouched(self) -> bool:
        """Whether nothing shows that somebody has changed them; cheap, and sure where it says no more than that."""
        held = self.tensors.values()
        now = (table.get(key) for table, key in self._places.values())
        return (
            all(map(operator.is_, now, held))
            and versions_of(list(held)) == self._versions
            and list(map(Tensor.data_ptr, held)) == self._at
            and self._samples.unchanged()
        )

    def writes(self, name: str) -> int | None:
        """How often a tensor was written in place since; ``None`` where that is not known, or it has other memory."""
        tensor = self.tensors.get(name)
        if tensor is None:
            return None
        at = list(self.tensors).index(name)
        return tensor._version - self._versions[at] if tensor.data_ptr() == self._at[at] else None


@torch.no_grad()
def same_values(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same values, no numbers (NaN) included."""
    return a.shape == b.shape and bool(torch.isclose(a, b, rtol=0, atol=0, equal_nan=True).all())


def _watched(tensor: Tensor) -> bool:
    if is_sharded(tensor) or type(tensor) not in (Tensor, nn.Parameter) or tensor.is_inference():
        return False
    return tensor.layout == torch.strided


def _dense(tensor: Tensor) -> bool:
    """Whether its elements fill the memory from the first to the last of them."""
    expected = 1
    for size, stride in sorted(zip(tensor.shape, tensor.stride(), strict=True), key=lambda pair: pair[1]):
        if size > 1 and stride != expected:
            return False
        expected *= size
    return True
