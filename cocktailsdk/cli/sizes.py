"""Building models that may be too large for this machine's memory."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from ..models import adapters, build_model

if TYPE_CHECKING:
    from torch import nn

__all__ = ["build"]

log = logging.getLogger(__name__)

LARGEST = 10**9
"""Models of more parameters are built without values, where nothing else is asked for."""


def build(reference: str, meta: bool | None) -> nn.Module:
    """A model by its reference.

    Args:
        reference: As :func:`cocktailsdk.models.build_model` takes it.
        meta: Whether to build it on the meta device, without values; ``None`` for large models of adapters only.

    Raises:
        AdapterError: The reference names nothing; says what comes near.
    """
    import torch

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
