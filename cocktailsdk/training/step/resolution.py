"""Batches at another resolution (MutualNet)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from ...errors import TrainingError

__all__ = ["resized"]


def resized(batch: Any, share: float) -> Any:
    """A batch with its input images' sides scaled, bilinearly; all else is left as it is.

    Args:
        batch: A tensor, ``(inputs, target)`` or a mapping; images are floating tensors ``(batch, channels, height,
            width)``, in a mapping those whose name does not begin with ``label`` or ``target``. Anything with a method
            ``resized(share)`` scales itself, so that boxes and masks go with their images.
        share: Of the batch's own sides.

    Raises:
        TrainingError: The batch has no such input.
    """
    if share == 1.0:
        return batch
    if callable(own := getattr(batch, "resized", None)):
        return own(share)
    out = _resized(batch, share)
    if out is batch:
        raise TrainingError(
            f"this recipe draws resolutions, and a batch of type {type(batch).__name__} has no input of floating "
            "images (batch, channels, height, width): choose a recipe without resolutions, or give batches a method "
            "resized(share)"
        )
    return out


def _resized(part: Any, share: float) -> Any:
    if isinstance(part, Tensor):
        if part.ndim != 4 or not part.is_floating_point():
            return part
        size = [max(1, round(side * share)) for side in part.shape[-2:]]
        return F.interpolate(part, size, mode="bilinear", align_corners=False)
    if isinstance(part, Mapping):
        new = {k: v if k.startswith(("label", "target")) else _resized(v, share) for k, v in part.items()}
        return new if any(new[k] is not part[k] for k in part) else part
    if isinstance(part, tuple | list) and part:
        first = _resized(part[0], share)
        return part if first is part[0] else type(part)([first, *part[1:]])
    return part
