"""Attention without heads is refused, because PyTorch 2.11 divides by their number."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

__all__ = ["RefuseEmptyHeads"]


class RefuseEmptyHeads(TorchFunctionMode):
    """While it is entered, attention without heads raises a ``ValueError``.

    The verification tries a slim module with several numbers of heads. All but one are wrong, and zero may be among
    them. With ``enable_gqa=True`` PyTorch 2.11 divides by that zero, which kills the process (SIGFPE). Later versions
    return zeros.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            operands = (*args[:3], *(kwargs.get(name) for name in ("query", "key", "value")))
            if any(isinstance(t, Tensor) and t.dim() > 3 and t.shape[-3] == 0 for t in operands):
                raise ValueError("attention without heads")
        return func(*args, **kwargs)
