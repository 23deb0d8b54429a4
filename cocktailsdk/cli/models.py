"""Models that are named on the command line, and inputs for them."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import AdapterError
from ..models import Inputs, adapters, build_model, example_inputs_for
from ..utils.modes import evaluating
from ..utils.undo import unchanged

__all__ = ["build", "inputs_for"]

log = logging.getLogger(__name__)

LARGEST = 10**9
"""Models of more parameters are built without values, where nothing else is asked for."""

SIDES = (224, 32, 28, 64)
"""Sides of images that are tried on a model of which nothing is known."""


def build(reference: str, meta: bool | None) -> nn.Module:
    """A model by its reference.

    Args:
        reference: As :func:`cocktailsdk.models.build_model` takes it.
        meta: Whether to build it on the meta device, without values; ``None`` for large models of adapters only.

    Raises:
        AdapterError: The reference names nothing; says what comes near.
    """
    if meta is None and not any(a.owns(reference) for a in adapters().values()):
        return build_model(reference)  # a user's factory is called once
    if meta is False:
        return build_model(reference)
    try:
        with torch.device("meta"):
            model = build_model(reference)
    except Exception as error:
        if meta:
            raise
        log.info("%s cannot be built without values: %s", reference, error)
        return build_model(reference)
    if meta or sum(p.numel() for p in model.parameters()) > LARGEST:
        return model
    return build_model(reference)


def inputs_for(model: nn.Module, sizes: Sequence[tuple[int, ...]] = ()) -> Inputs:
    """Inputs for one forward pass, batch size 1.

    Args:
        model: The model.
        sizes: Shapes without the batch, for the inputs in order; without any, the model or its adapter is asked, and
            where nobody knows, what fits the first layer is tried.

    Raises:
        AdapterError: Nothing is known, and nothing that was tried runs.
    """
    try:
        known = example_inputs_for(model)
    except AdapterError:
        if sizes:
            return tuple(_noise((1, *s)) for s in sizes), {}
        for candidate in _candidates(model):
            if _runs(model, candidate):
                return (candidate,), {}
        raise
    return _resized(known, sizes) if sizes else known


def _resized(known: Inputs, sizes: Sequence[tuple[int, ...]]) -> Inputs:
    """The known inputs with other shapes, of the same kinds."""
    args, kwargs = list(known[0]), dict(known[1])
    places: list[tuple[Any, Any]] = [(args, i) for i, a in enumerate(args) if isinstance(a, Tensor)]
    places += [(kwargs, k) for k, v in kwargs.items() if isinstance(v, Tensor)]
    if len(sizes) > len(places):
        raise AdapterError(f"{len(sizes)} input sizes are given, but the model takes {len(places)} tensors")
    for (holder, at), size in zip(places, sizes, strict=False):
        if holder[at].ndim != len(size) + 1:
            name = f"input {at!r}" if isinstance(at, str) else f"input {at + 1}"
            like = ",".join(map(str, holder[at].shape[1:])) or "none"
            raise AdapterError(
                f"--input-size {','.join(map(str, size))} does not fit {name} of this model, which has "
                f"{holder[at].ndim - 1} dimensions without the batch: write it like {like}"
            )
        floating = holder[at].dtype.is_floating_point
        holder[at] = _noise((1, *size)) if floating else torch.ones(1, *size, dtype=holder[at].dtype)
    return tuple(args), kwargs


def _candidates(model: nn.Module) -> Iterator[Tensor]:
    """What the first layer could take."""
    for module in model.modules():
        if isinstance(module, nn.Conv1d):
            yield from (_noise((1, module.in_channels, side)) for side in (1024, 128))
        elif isinstance(module, nn.Conv2d):
            yield from (_noise((1, module.in_channels, side, side)) for side in SIDES)
        elif isinstance(module, nn.Conv3d):
            yield _noise((1, module.in_channels, 16, 64, 64))
        elif isinstance(module, nn.Linear):
            yield _noise((1, module.in_features))
            yield _noise((1, 16, module.in_features))
        elif isinstance(module, nn.Embedding):
            yield torch.ones(1, 16, dtype=torch.int64)
        else:
            continue
        return


def _runs(model: nn.Module, x: Tensor) -> bool:
    try:
        with unchanged(model), evaluating(model, clear_caches=True), torch.no_grad():
            model(x)
    except Exception:  # whatever the model says of an input that it cannot take
        return False
    return True


def _noise(shape: Sequence[int]) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))
