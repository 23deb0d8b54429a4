"""A network as one graph with a batch of any size: what all formats but plain tensors are written from."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, ShapesCollection
from torch.utils._pytree import tree_leaves

from ..errors import ExportFailed
from .example_inputs import Inputs
from .plain_outputs import plain_outputs

__all__ = ["Traced", "first_line", "program_of", "quiet"]

TRACED = 3
"""Examples in the batch that a model of any batch size is traced on: 1 would become a constant, 2 is a usual size."""

_LOGGERS = ("torch", "onnxscript", "onnx_ir", "nncf")


@dataclass(frozen=True)
class Traced:
    """A network's graph.

    Attributes:
        program: What ``torch.export`` made.
        shapes: The ``dynamic_shapes`` it was made with; ``None`` where all are fixed.
    """

    program: ExportedProgram
    shapes: Any


def program_of(model: nn.Module, inputs: Inputs, *, dynamic_batch: bool = True) -> Traced:
    """The whole model by ``torch.export``, in eval mode, with plain outputs.

    Args:
        model: On the CPU, in eval mode.
        inputs: Its example inputs.
        dynamic_batch: Whether the batch may have any size; otherwise that of the example.

    Raises:
        ExportFailed: It cannot be followed.
    """
    shapes = None
    if dynamic_batch:
        # Sizes 0 and 1 are specialised by torch.export, and 2 may equal another size of the model, which would tie
        # both.
        inputs = inputs.fresh(TRACED)
        collection, batch = ShapesCollection(), Dim("batch", min=1)
        for t in tree_leaves((inputs.args, inputs.kwargs)):
            if isinstance(t, Tensor) and inputs.carries_batch(t):
                # One Dim object for all inputs: torch.export then knows that their batches are equal.
                collection[t] = {0: batch}
        shapes = collection.dynamic_shapes(model, inputs.args, inputs.kwargs)
    try:
        with quiet(), torch.no_grad(), plain_outputs(model):
            made = torch.export.export(model, inputs.args, inputs.kwargs, dynamic_shapes=shapes, strict=False)
    except Exception as error:
        fixed = "; dynamic_batch=False fixes the batch to the example's size" if dynamic_batch else ""
        raise ExportFailed(
            f"torch.export cannot follow the whole {type(model).__name__} ({first_line(error)}){fixed}. The plain slim "
            "model needs no graph: export to .safetensors."
        ) from error
    return Traced(made, shapes)


def first_line(error: Exception) -> str:
    """An error's class and the first line of what it says, or the first 200 characters of it."""
    lines = str(error).strip().splitlines() or ["no message"]
    return f"{type(error).__name__}: {lines[0][:200]}"


@contextmanager
def quiet() -> Iterator[None]:
    """Silences exporters' own notes, which mean nothing to users; what fails raises."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    # Some exporters write to stderr directly, past Python's logging.
    with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            for logger in loggers:
                logger.setLevel(logging.CRITICAL)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
