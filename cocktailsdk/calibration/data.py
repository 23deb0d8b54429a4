"""Calibration data: batches of the forms that training takes, without padding, and their fingerprint."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import PatternError
from ..utils.nested import tensors_in, to_device

__all__ = ["CalibrationData"]

PADDING = "attention_mask"
"""The key of a mask of tokens that are no padding, as transformers names it."""


@dataclass(frozen=True)
class CalibrationData:
    """Batches that are run several times, in the same order, held on the CPU.

    Attributes:
        batches: Without padding tokens.
        examples: How many there are: the first axis of the first tensor of each batch.
        fingerprint: Hexadecimal digits that identify the data: of the values and shapes of all tensors, in order.
    """

    batches: tuple[Any, ...]
    examples: int
    fingerprint: str

    @classmethod
    def of(cls, loader: Iterable[Any]) -> CalibrationData:
        """All batches of a loader.

        Raises:
            PatternError: There are none, or ``loader`` is no iterable of batches.
        """
        if isinstance(loader, Tensor | Mapping | str) or not isinstance(loader, Iterable):
            raise PatternError(
                f"calibration must be a loader or a list of batches, not {type(loader).__name__}; put a single batch "
                "into a list"
            )
        batches: list[Any] = []
        sha, examples = hashlib.sha256(), 0
        for batch in loader:
            batch = to_device(batch, torch.device("cpu"))
            tensors = tensors_in(batch)
            examples += tensors[0].shape[0] if tensors and tensors[0].ndim else 1
            for tensor in tensors:
                sha.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
                sha.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
            batches += unpadded(batch)
        if not batches:
            raise PatternError("calibration got no batches: the loader was empty (an iterator that was used up?)")
        return cls(tuple(batches), examples, sha.hexdigest()[:16])


def unpadded(batch: Any) -> Iterator[Any]:
    """A batch without padding tokens: as it is where there are none, otherwise one batch for each example.

    Padding is known by an ``attention_mask`` of shape ``(examples, tokens)``, in the batch or in its first element.
    Each example is cut to the tokens that count, and so is everything that has a value for each token.
    """
    if isinstance(batch, tuple | list) and batch and isinstance(batch[0], Mapping):
        length = len(batch[0].get(PADDING, ()))
        for i, inputs in enumerate(unpadded(batch[0])):
            if inputs is batch[0]:
                yield batch
                return
            yield (inputs, *(t[i : i + 1] if isinstance(t, Tensor) and len(t) == length else t for t in batch[1:]))
        return
    mask = batch.get(PADDING) if isinstance(batch, Mapping) else None
    if not isinstance(mask, Tensor) or mask.ndim != 2 or bool(mask.bool().all()):
        yield batch
        return
    for i, keep in enumerate(mask.bool()):
        if bool(keep.any()):
            yield {key: _example(value, i, mask.shape, keep) for key, value in batch.items()}


def _example(value: Any, i: int, shape: torch.Size, keep: Tensor) -> Any:
    if not isinstance(value, Tensor) or value.ndim == 0 or value.shape[0] != shape[0]:
        return value
    one = value[i : i + 1]
    return one[:, keep] if value.ndim > 1 and value.shape[1] == shape[1] else one
