"""Detects in-place writes to tensors while a subnetwork is active: a switch would overwrite these without a word."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..utils.fsdp import is_sharded
from .tensor_table import Slot

__all__ = ["ByteSamples", "WriteWatch", "addresses_of", "same_values", "versions_of"]

_SMALL = 1024  # bytes; tensors up to this size are compared in full
_BLOCKS, _BLOCK = 4, 32  # from larger ones, this many blocks of this many bytes

_version = operator.attrgetter("_version")


# Tensor._version is autograd's version counter: every in-place operation raises it, and no public name reads it.
# The whole of switching relies on it, so tests/test_net_write_watch.py fails on a torch release without it.
# `map` with an attrgetter keeps the loop in C: a preloaded switch takes microseconds, and most of that is such loops.


def versions_of(tensors: Sequence[Tensor]) -> list[int]:
    """How often each tensor was written in place, as torch counts it. Writes through ``.data`` are not counted."""
    return list(map(_version, tensors))


def addresses_of(tensors: Sequence[Tensor]) -> list[int]:
    """Where each tensor's memory begins. Assigning ``tensor.data`` changes it; writing in place does not."""
    return list(map(Tensor.data_ptr, tensors))


class ByteSamples:
    """A few bytes of each tensor on the CPU, spread over its memory.

    They show writes that torch does not count: values copied in through ``.data``, as adapters do when they merge, and
    as many weight averages do. Tensors of at most 1,024 bytes are compared in full.

    Args:
        tensors: Their memory is read, so a later write through any other tensor in the same memory shows as well.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._blocks = [block for t in tensors for block in _blocks_of(t)]
        self._values = b"".join(self._blocks)

    def unchanged(self) -> bool:
        """Whether the memory still has the same bytes."""
        # Joining memory views costs about 50 ns a block; any torch operation costs microseconds for each tensor.
        return b"".join(self._blocks) == self._values


def _blocks_of(tensor: Tensor) -> list[memoryview]:
    """Views of a tensor's memory: all of a small tensor, else blocks from its beginning to its end."""
    plain = tensor.device.type == "cpu" and tensor.layout == torch.strided
    if not plain or not tensor.numel() or not _fills_memory(tensor):
        return []
    # As one row of bytes in memory order: `view(-1)` would refuse transposed and channels-last tensors.
    flat = tensor.detach().as_strided((tensor.numel(),), (1,), tensor.storage_offset())
    memory = flat.view(torch.uint8).numpy().data
    if len(memory) <= _SMALL:
        return [memory]
    starts = (round(i * (len(memory) - _BLOCK) / (_BLOCKS - 1)) for i in range(_BLOCKS))
    return [memory[start : start + _BLOCK] for start in starts]


class WriteWatch:
    """The state of tensors when a subnetwork became active.

    Args:
        slots: By name, where each tensor is.
        names: Which tensors to watch. Sharded tensors, and those without a version counter, are left out.
        samples: Whether to detect values that are written through ``.data``, too.

    Attributes:
        tensors: Those that are watched, by name.
    """

    def __init__(self, slots: Mapping[str, Slot], names: Sequence[str], *, samples: bool) -> None:
        self._slots = {n: slots[n] for n in names if _watchable(slots[n][0][slots[n][1]])}
        self.tensors = {n: table[key] for n, (table, key) in self._slots.items()}
        watched = list(self.tensors.values())
        self._versions, self._addresses = versions_of(watched), addresses_of(watched)
        self._samples = ByteSamples(watched if samples else [])

    def untouched(self) -> bool:
        """Whether no write was detected. It is cheap, and a write may have left the values as they were."""
        watched = list(self.tensors.values())
        current = (table.get(key) for table, key in self._slots.values())
        return (
            all(map(operator.is_, current, watched))
            and versions_of(watched) == self._versions
            and addresses_of(watched) == self._addresses
            and self._samples.unchanged()
        )

    def write_count(self, name: str) -> int | None:
        """How often a tensor was written in place since; ``None`` if it is not watched or has other memory now."""
        tensor = self.tensors.get(name)
        if tensor is None:
            return None
        i = list(self.tensors).index(name)
        return tensor._version - self._versions[i] if tensor.data_ptr() == self._addresses[i] else None


@torch.no_grad()
def same_values(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same values; NaN equals NaN."""
    return a.shape == b.shape and bool(torch.isclose(a, b, rtol=0, atol=0, equal_nan=True).all())


def _watchable(tensor: Tensor) -> bool:
    # Inference tensors have no version counter, and subclasses may not share memory with what they show.
    if is_sharded(tensor) or type(tensor) not in (Tensor, nn.Parameter) or tensor.is_inference():
        return False
    return tensor.layout == torch.strided


def _fills_memory(tensor: Tensor) -> bool:
    """Whether its elements fill the memory from the first to the last without gaps, in any order of the axes."""
    expected = 1
    for size, stride in sorted(zip(tensor.shape, tensor.stride(), strict=True), key=lambda pair: pair[1]):
        if size > 1 and stride != expected:
            return False
        expected *= size
    return True
