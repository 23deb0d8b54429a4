"""The most memory that a model's tensors take at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["peak_bytes"]


def peak_bytes(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Bytes of weights, inputs and activations at the worst moment of one forward pass.

    On CUDA it is what PyTorch's allocator counted. Elsewhere the tensors alive are counted after every operation, which
    leaves out what kernels need inside for themselves.
    """
    owned = [
        *model.parameters(),
        *model.buffers(),
        *(t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)),
    ]
    device = owned[0].device if owned else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        with torch.no_grad():
            model(*args, **kwargs)
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device)
    with torch.no_grad(), _Alive(owned) as alive:
        model(*args, **kwargs)
    return alive.peak


class _Alive(TorchDispatchMode):
    """Counts the bytes of all storages that are alive."""

    def __init__(self, owned: list[Tensor]) -> None:
        super().__init__()
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self._bytes = self.peak = 0
        self._seen(owned)

    def _seen(self, tensors: list[Tensor]) -> None:
        for key, (ref, size) in list(self._alive.items()):
            if ref.expired():
                del self._alive[key]
                self._bytes -= size
        for t in tensors:
            storage = t.untyped_storage()
            ref = StorageWeakRef(storage)
            if ref.cdata not in self._alive:
                self._alive[ref.cdata] = (ref, storage.nbytes())
                self._bytes += storage.nbytes()
        self.peak = max(self.peak, self._bytes)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self._seen([t for t in tree_leaves(out) if isinstance(t, Tensor)])
        return out
