"""FLOPs of a real forward pass, counted on any supported version of PyTorch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

__all__ = ["measured_flops", "unfused"]


@contextmanager
def unfused() -> Iterator[None]:
    """Run attention and recurrent layers as the matrix products that they are made of.

    ``FlopCounterMode`` counts products and convolutions. Which fused kernels it counts depends on the version: PyTorch
    2.11 to 2.14 miss flash attention on a CPU. Every version misses the fast paths of ``nn.TransformerEncoderLayer``
    and ``nn.MultiheadAttention``, and oneDNN's LSTM. All settings are restored on exit.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    with ExitStack() as stack:
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(torch.backends.mkldnn.flags(enabled=False))
        stack.callback(torch.backends.mha.set_fastpath_enabled, fast)
        torch.backends.mha.set_fastpath_enabled(False)
        yield


def measured_flops(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None) -> dict[str, int]:
    """FLOPs (2 x multiply-adds) of one forward pass without gradients, by module.

    Args:
        model: Any module; its mode (training or not) is left as it is.
        args: Positional arguments of the pass.
        kwargs: Keyword arguments of the pass.

    Returns:
        FLOPs by module path, those of children included; ``""`` is the whole model.
    """
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), unfused(), counter:
        model(*args, **(kwargs or {}))
    root = type(model).__name__
    counts = {path.removeprefix(f"{root}."): sum(ops.values()) for path, ops in counter.get_flop_counts().items()}
    return {**counts, "": counter.get_total_flops()}
