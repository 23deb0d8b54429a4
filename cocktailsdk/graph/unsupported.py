"""Recognises modules that cannot be traced or pruned by their kind, with the reason."""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from ..errors import ExportFailed
from .coupling import Kept

__all__ = ["hookable", "is_scripted", "refuse_unsupported", "unsupported_modules"]

_ScriptModule: type | None = getattr(torch.jit, "ScriptModule", None)  # TorchScript is deprecated

_QUANTIZED = re.compile(r"(^|[._])(quantized|bitsandbytes|gptq|awq|hqq|auto_round)([._]|$)", re.IGNORECASE)
"""Packages of modules that hold packed integers in place of floating-point weights."""

_FLOAT = frozenset({"FloatFunctional", "FXFloatFunctional"})
"""Of such packages, what models hold before they are quantized."""

_OBSERVING = re.compile(r"FakeQuant|Observer$")
"""Classes of modules that preparing for quantization puts into a model, in PyTorch and in torchao."""


def is_scripted(module: nn.Module) -> bool:
    """Whether a module is TorchScript."""
    return _ScriptModule is not None and isinstance(module, _ScriptModule)


def hookable(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The named modules that take hooks; TorchScript takes none."""
    return ((path, module) for path, module in model.named_modules() if not is_scripted(module))


def unsupported_modules(model: nn.Module) -> tuple[Kept, ...]:
    """Modules whose kind keeps them from being pruned, with the reason; of nested ones the outermost."""
    found: list[Kept] = []
    inside: tuple[str, ...] = ()
    for path, module in model.named_modules():
        reason = "" if path.startswith(inside) and inside else _why(module)
        if reason:
            found.append(Kept(path or "the model", reason))
            inside = (*inside, f"{path}.") if path else ("",)
    return tuple(found)


def _lazy(module: nn.Module) -> bool:
    return any(is_lazy(t) for t in (*module.parameters(recurse=False), *module.buffers(recurse=False)))


def _why(module: nn.Module) -> str:
    kind = type(module)
    if is_scripted(module):
        return (
            "TorchScript: it was compiled by torch.jit, and its code cannot be followed; use the module it was made of"
        )
    if _lazy(module):
        return f"{kind.__name__} is lazy and has not seen a batch: run the model once on real inputs before"
    if _OBSERVING.search(kind.__name__):
        return (
            f"{kind.__name__}: the model is prepared for quantization, so its weights and activations pass through "
            "fake quantizers or observers; sparsify the float model first, and prepare it for quantization afterwards"
        )
    packed = any(t.is_quantized for t in module.buffers(recurse=False))
    if packed or (_QUANTIZED.search(kind.__module__) and kind.__name__ not in _FLOAT):
        return (
            f"{kind.__name__} is quantized: it holds packed integers in place of floating-point weights; sparsify the "
            "float model first, and quantize it afterwards"
        )
    return ""


def refuse_unsupported(model: nn.Module) -> None:
    """Refuses models of which no part can be followed, before anything is run.

    Raises:
        ExportFailed: The model is TorchScript, or lazy.
    """
    name = type(model).__name__
    if is_scripted(model):
        raise ExportFailed(
            f"{getattr(model, 'original_name', name)} is TorchScript: it was compiled by torch.jit, and its Python "
            "code is gone, so it cannot be followed. Pass the nn.Module that it was made of."
        )
    # UninitializedParameter has no shape, so nothing can be exported before the first batch.
    lazy = [path or "the model" for path, module in model.named_modules() if _lazy(module)]
    if lazy:
        raise ExportFailed(
            f"{name} has {len(lazy)} lazy modules that have not seen a batch ({', '.join(map(repr, lazy[:3]))}"
            f"{', …' if len(lazy) > 3 else ''}), so their shapes are not known. Run it once before: "
            "model(*example_inputs)."
        )
