"""Grouped matrix products (mixture of experts) that every supported version of PyTorch can export.

``torch.nn.functional.grouped_mm`` runs in float32 on a CPU. Up to PyTorch 2.14, ``torch.export`` refuses the same call:
its shape inference accepts only bfloat16 (2.14 also float16, on some GPUs). `ExportableGroups` replaces such calls with
an op of ours while a model is exported.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["ExportableGroups", "grouped_mm"]

# Private, because function modes do not see F.grouped_mm, a Python function around this kernel. A version without the
# kernel replaces nothing.
_KERNEL = getattr(torch, "_grouped_mm", None)


@torch.library.custom_op("cocktailsdk::grouped_mm", mutates_args=())
def grouped_mm(x: Tensor, w: Tensor, offs: Tensor) -> Tensor:
    """``out[t] = x[t] @ w[g]``, where ``t`` is one of the rows that end at ``offs[g]``.

    Args:
        x: Rows in the order of their groups, of shape (rows, in).
        w: A matrix for each group, of shape (groups, in, out).
        offs: Where each group's rows end, ascending, of shape (groups,).

    Returns:
        A tensor of shape (rows, out); rows after the last group are zero.
    """
    out, start = x.new_zeros(x.shape[0], w.shape[2]), 0
    for matrix, end in zip(w, offs.tolist(), strict=True):
        torch.mm(x[start:end], matrix, out=out[start:end])
        start = end
    return out


@grouped_mm.register_fake
def _(x: Tensor, w: Tensor, offs: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], w.shape[2])


class ExportableGroups(TorchFunctionMode):
    """While it is entered, ``F.grouped_mm`` of rows and a stack of matrices calls this module's `grouped_mm`."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _KERNEL is not None and func is _KERNEL:
            call = dict(zip(("x", "w", "offs", "bias", "out_dtype"), args, strict=False))
            call |= {{"self": "x", "mat2": "w"}.get(name, name): value for name, value in kwargs.items()}
            x, w, offs = call["x"], call["w"], call.get("offs")
            plain = call.get("bias") is None and call.get("out_dtype") is None
            if plain and offs is not None and (x.dim(), w.dim()) == (2, 3):
                return grouped_mm(x, w, offs)
        return func(*args, **kwargs)
