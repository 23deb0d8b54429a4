"""Model outputs as plain tensors by name: other runtimes know no ``ModelOutput``."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

__all__ = ["named_outputs", "plain_outputs"]

SINGLE = "output"
"""The name of an output that has none."""


def named_outputs(output: Any) -> dict[str, Tensor]:
    """The tensors of an output by name: keys of mappings and dataclasses, positions in sequences, joined by ``_``.

    What is no tensor (a language model's cache, say) is left out.
    """
    return {name or SINGLE: tensor for name, tensor in _walk(output, "")}


@contextmanager
def plain_outputs(model: nn.Module) -> Iterator[None]:
    """Inside, a model returns a tensor as it is, and anything else as the mapping of :func:`named_outputs`."""
    # A hook instead of a wrapper module, so that names of parameters in the exported file stay those of the model.
    hook = model.register_forward_hook(
        lambda _model, _inputs, output: output if isinstance(output, Tensor) else named_outputs(output)
    )
    try:
        yield
    finally:
        hook.remove()


def _walk(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
        return
    if isinstance(value, Mapping):
        parts = [(str(k), v) for k, v in value.items()]
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = [(f.name, getattr(value, f.name)) for f in dataclasses.fields(value)]
    elif isinstance(value, list | tuple):
        parts = [(str(i), v) for i, v in enumerate(value)]
    else:
        return
    for key, part in parts:
        # A bare number is no valid name of an output in ONNX, so positions of a tuple get a prefix.
        yield from _walk(part, f"{name}_{key}" if name else key if not key.isdecimal() else f"{SINGLE}_{key}")
