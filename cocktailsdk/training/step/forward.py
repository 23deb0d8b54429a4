"""How a batch is used: its resolution, the forward pass and the logits, found from what is given."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_map

from ...errors import TrainingError

__all__ = ["detached", "mapped", "output_tensor", "resized"]


def output_tensor(output: Any) -> Tensor | None:
    """The logits in a model's output: itself, ``.logits``, ``["logits"]`` or the first of a tuple; else ``None``."""
    if isinstance(output, Tensor):
        return output
    logits = getattr(output, "logits", None)
    if logits is None and isinstance(output, Mapping):
        logits = output.get("logits")
    if logits is None and isinstance(output, tuple | list) and output:
        logits = output[0]
    return logits if isinstance(logits, Tensor) else None


def mapped(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """An output of any kind, each of its tensors changed."""

    def visit(part: Any) -> Any:
        if isinstance(part, Tensor):
            return change(part)
        if dataclasses.is_dataclass(part) and not isinstance(part, type):
            new = copy.copy(part)
            for field in dataclasses.fields(part):
                # not setattr, which frozen ones refuse; with slots there is no __dict__
                object.__setattr__(new, field.name, tree_map(visit, getattr(part, field.name)))
            return new
        if not hasattr(part, "__dict__") or callable(part):
            return part
        part = copy.copy(part)  # an object of a class of the user's own
        for name, value in vars(part).items():
            if isinstance(value, Tensor):
                setattr(part, name, change(value))
        return part

    return tree_map(visit, output)


def detached(output: Any) -> Any:
    """An output of any kind, its tensors detached: a teacher's, through which no gradient goes."""
    return mapped(output, Tensor.detach)


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
