"""A model traced on example inputs, and its coupling."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..errors import PatternError
from ..graph import Coupling, couple
from ..models import example_inputs_for
from ..utils.devices import device_of
from ..utils.nested import to_device
from .target_modules import Selection

__all__ = ["Example", "couple_model", "example_of"]

Example = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of one forward pass."""


def example_of(model: nn.Module, inputs: Any = (), kwargs: Mapping[str, Any] | None = None) -> Example:
    """Example inputs as ``(args, kwargs)``: those given, or else an adapter's.

    Raises:
        AdapterError: None were given and no adapter knows the model.
    """
    if isinstance(inputs, Tensor):
        inputs = (inputs,)
    elif not isinstance(inputs, list | tuple):
        raise PatternError(f"example_inputs must be a tuple of the model's arguments, not {type(inputs).__name__}")
    if inputs or kwargs:
        return tuple(inputs), dict(kwargs or {})
    args, found = example_inputs_for(model)
    return tuple(args), dict(found)


def couple_model(model: nn.Module, example: Example, selection: Selection, *, prove: bool = True) -> Coupling:
    """The model's coupling, on its own device; see :func:`cocktailsdk.graph.couple`."""
    args, kwargs = to_device(example, device_of(model))
    return couple(model, args, kwargs, exclude=selection.keeps_channels if selection.whole else None, prove=prove)
