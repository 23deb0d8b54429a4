"""Whether somebody changed tensors while a subnetwork was active: a switch would lose that without a word."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from .sharding import is_sharded

__all__ = ["Samples", "Watch", "same_values", "versions_of"]

_SMALL = 256  # of tensors with no more elements all are compared
_FEW = 16  # of larger ones so many

_version = operator.attrgetter("_version")


def versions_of(tensors: Sequence[Tensor]) -> list[int]:
    """How often each was written in place, as torch counts it. Writing through ``.data`` is not counted."""
    return list(map(_version, tensors))


class Samples:
    """A few elements of each of some tensors on the CPU, spread over their memory.

    They show what torch does not count: values copied in through ``.data``, as merging adapters and many averages of
    weights do. Small tensors are compared whole.

    Args:
        tensors: Views are taken of their memory; others that are given the same memory later are read as well.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        views: dict[torch.dtype, list[Tensor]] = {}
        for t in tensors:
            if t.device.type == "cpu" and t.layout == torch.strided and t.numel() and _dense(t):
                step = 1 if t.numel() <= _SMALL else t.numel() // _FEW
                count = t.numel() if step == 1 else _FEW
                view = t.detach().as_strided((count,), (step,), t.storage_offset())
                views.setdefault(t.dtype, []).append(view)
        self._views = list(views.values())
        self._values = self._read()

    def unchanged(self) -> bool:
        """Whether they still have their values; false also where one is not a number."""
        return all(map(torch.equal, self._read(), self._values))

    def _read(self) -> list[Tensor]:
        with torch.inference_mode(False), torch.no_grad():
            return [torch.cat(views) for views in self._views]


class Watch:
    """What tensors were when a subnetwork became active.

    Args:
        where: By name, the table of a module and the key in it where each tensor is.
        names: Which to watch. Sharded ones, and those whose memory cannot be seen, are left out.
    """

    def __init__(self, where: Mapping[str, tuple[dict[str, Tensor], str]], names: Sequence[str]) -> None:
        self._places = {n: where[n] for n in names if _watched(where[n][0][where[n][1]])}
        self.tensors = {n: table[key] for n, (table, key) in self._places.items()}
        held = list(self.tensors.values())
        self._versions, self._at = versions_of(held), list(map(Tensor.data_ptr, held))
        self._samples = Samples(held)

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
