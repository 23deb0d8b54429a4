"""Batches of any form: moved to a device, and split into the model's inputs and the target.

Training, evaluation and recalibration all use these functions, so that a batch means the same to each of them.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import TrainingError
from .devices import device_of

__all__ = ["default_forward", "form_of", "nbytes", "outputs_of", "split", "tensors_in", "to_device"]

TARGETS = ("labels", "label", "targets", "target", "y")
"""Names under which data sets keep the target, the usual one first."""


def to_device(batch: Any, device: torch.device) -> Any:
    """A batch with all its tensors on a device.

    Args:
        batch: A tensor, a NumPy array of numbers (which becomes a tensor of the same dtype), anything with a ``.to``
            method, or tuples, lists, mappings and dataclasses of such. Everything else stays as it is.
        device: The target device.
    """
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, np.ndarray):
        return _from_numpy(batch, device)
    if isinstance(batch, str | bytes | type):
        return batch
    if callable(getattr(batch, "to", None)):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {k: to_device(v, device) for k, v in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(to_device(v, device) for v in batch))
    if isinstance(batch, tuple | list):
        moved = [to_device(v, device) for v in batch]
        return moved if isinstance(batch, list) else tuple(moved)
    if dataclasses.is_dataclass(batch):
        return _replaced(batch, {f.name: to_device(getattr(batch, f.name), device) for f in dataclasses.fields(batch)})
    return batch


def _from_numpy(array: np.ndarray[Any, Any], device: torch.device) -> Any:
    if array.dtype.kind not in "biufc":  # strings and objects have no tensor
        return array
    # torch warns of read-only arrays and cannot take negative strides or foreign byte order: those are copied
    own = np.require(array, array.dtype.newbyteorder("="), ["C", "W"])
    return torch.from_numpy(own).to(device)


def _replaced(batch: Any, values: Mapping[str, Any]) -> Any:
    """A dataclass with other values; not by its constructor, which may want or compute others."""
    new = object.__new__(type(batch))
    for name, value in getattr(batch, "__dict__", {}).items():
        object.__setattr__(new, name, value)
    for name, value in values.items():
        object.__setattr__(new, name, value)
    return new


def _parts(batch: Any) -> list[Any]:
    """What a container holds; nothing for all else."""
    if isinstance(batch, Mapping):
        return list(batch.values())
    if isinstance(batch, tuple | list):
        return list(batch)
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        return [getattr(batch, f.name) for f in dataclasses.fields(batch)]
    return []


def tensors_in(batch: Any) -> list[Tensor]:
    """All tensors in a batch, in order."""
    if isinstance(batch, Tensor):
        return [batch]
    return [tensor for part in _parts(batch) for tensor in tensors_in(part)]


def nbytes(batch: Any) -> int:
    """Bytes of all tensors and arrays in a batch."""
    if isinstance(batch, Tensor):
        return batch.numel() * batch.element_size()
    own = getattr(batch, "nbytes", None)
    if isinstance(own, int) and not isinstance(batch, Mapping | tuple | list):
        return own
    return sum(map(nbytes, _parts(batch)))


def default_forward(model: nn.Module, batch: Any) -> tuple[Any, Any]:
    """Run a model on a batch of one of the usual forms.

    ====================== ======================================================================
    batch                  used as
    ====================== ======================================================================
    ``(x, y)``             ``model(x)``, target ``y``; ``x`` may be a tuple (``model(*x)``) or a
                           mapping (``model(**x)``)
    ``(x,)`` or a tensor   ``model(x)``, target ``None``
    a mapping              ``model(**batch)``; target ``batch["labels"]``, or ``"label"``,
                           ``"target"``, ``"targets"`` or ``"y"``
    ====================== ======================================================================

    Of a mapping, the model gets the target only if its ``forward`` names it. Where the one other tensor has a name that
    ``forward`` does not know, and ``forward`` takes one input, that tensor is the input: ``{"image": x, "label": y}``.
    Dataclasses and named tuples with a field of one of these names are used as mappings.

    Args:
        model: The subnetwork that is active.
        batch: From the loader, on the model's device.

    Returns:
        The model's output and the target.

    Raises:
        TrainingError: For any other batch; names ``forward_fn``.
    """
    args, kwargs, target = split(model, batch)
    return model(*args, **kwargs), target


def outputs_of(model: nn.Module, batch: Any) -> Any:
    """Run a model on a batch where no target is wanted: of a longer tuple the first element is the input.

    The batch is moved to the model's device.
    """
    batch = to_device(batch, device_of(model))
    if isinstance(batch, tuple | list) and len(batch) > 2 and _named(batch) is None:
        batch = batch[:1]
    return default_forward(model, batch)[0]


def split(model: nn.Module, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
    """The positional and keyword arguments of the model in a batch, and the target; see :func:`default_forward`."""
    named = _named(batch)
    if named is not None:
        return _split_named(model, named)
    if isinstance(batch, Tensor):
        return (batch,), {}, None
    if isinstance(batch, tuple | list) and 1 <= len(batch) <= 2:
        x, target = (*batch, None)[:2]
        if isinstance(x, Mapping):
            args, kwargs = _matched(
                model, dict(x), form_of(batch), "batch[0]", "batch[1]" if len(batch) > 1 else "None"
            )
            return args, kwargs, target
        if isinstance(x, tuple | list):
            return tuple(x), {}, target
        return (x,), {}, target
    raise TrainingError(
        f"cannot tell how to use a batch that is {form_of(batch)}: known are (inputs, target), a tensor and a mapping "
        "of keyword arguments; give forward_fn(model, batch) -> (output, target)"
    )


def _named(batch: Any) -> dict[str, Any] | None:
    """A batch as a mapping, where its parts have names that say what they are."""
    if isinstance(batch, Mapping):
        return {str(key): value for key, value in batch.items()}
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        return {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
    fields = getattr(batch, "_fields", ())
    if isinstance(batch, tuple) and any(name in fields for name in TARGETS):
        return dict(zip(fields, batch, strict=True))
    return None


def _split_named(model: nn.Module, batch: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
    names, anything, _ = _parameters(model)
    # a forward that names "y" may well mean a second input
    key = next((name for name in TARGETS if name in batch and not (name == "y" and "y" in names)), None)
    target = None if key is None else batch[key]
    inputs = {name: value for name, value in batch.items() if name != key}
    if key is not None and (key in names or (anything and (key == "labels" or not names))):
        inputs = dict(batch)  # also for wrappers, which pass everything on
    elif key is not None and "labels" in names:
        inputs["labels"] = target  # as transformers' collators rename it
    args, kwargs = _matched(model, inputs, form_of(batch), target="None" if key is None else f"batch[{key!r}]")
    return args, kwargs, target


def _matched(
    model: nn.Module, inputs: dict[str, Any], form: str, source: str = "batch", target: str = "None"
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Keyword arguments as they are if ``forward`` takes them; a single tensor as its one input."""
    names, anything, required = _parameters(model)
    unknown = [name for name in inputs if name not in names]
    if not unknown or (anything and required <= inputs.keys()):
        return (), inputs
    tensors = [value for value in inputs.values() if isinstance(value, Tensor)]
    others = [name for name, value in inputs.items() if not isinstance(value, Tensor) and name in names]
    if len(tensors) == 1 and not others and len(required) <= 1 and names:
        return (tensors[0],), {}
    takes = ", ".join(names) or "nothing"
    known = [name for name in names if name in inputs]
    if known:
        arguments = ", ".join(f"{name}={source}[{name!r}]" for name in known)
    else:  # the largest tensor is more likely the input than an index is
        key = max(unknown, key=lambda name: value.numel() if isinstance(value := inputs[name], Tensor) else -1)
        arguments = f"{source}[{key!r}]"
    raise TrainingError(
        f"the model's forward takes ({takes}) and the batch is {form}: say how to use it, for example "
        f"forward_fn=lambda model, batch: (model({arguments}), {target})"
    )


def _parameters(model: nn.Module) -> tuple[dict[str, None], bool, frozenset[str]]:
    """Names that ``forward`` takes, whether it takes any others too, and which it must be given."""
    try:
        found = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):  # compiled or scripted: ask nothing, pass everything
        return {}, True, frozenset()
    usable = [p for p in found if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    required = frozenset(p.name for p in usable if p.default is p.empty)
    return dict.fromkeys(p.name for p in usable), any(p.kind is p.VAR_KEYWORD for p in found), required


def form_of(batch: Any) -> str:
    """What a batch is, in a few words, for errors: ``a dict of image (4, 3, 8, 8), label (4,)``."""
    if isinstance(batch, Tensor | np.ndarray):
        return f"{_kind(batch)} {tuple(batch.shape)} of {str(batch.dtype).removeprefix('torch.')}"
    if isinstance(batch, Mapping):
        parts = [f"{key} {_short(value)}" for key, value in list(batch.items())[:6]]
        return f"{_kind(batch)} of {', '.join(parts) or 'nothing'}{', …' if len(batch) > 6 else ''}"
    if isinstance(batch, tuple | list):
        parts = [_short(value) for value in batch[:4]]
        return f"{_kind(batch)} of {len(batch)} ({', '.join(parts)}{', …' if len(batch) > 4 else ''})"
    return _kind(batch)


def _short(value: Any) -> str:
    if isinstance(value, Tensor | np.ndarray):
        return f"{tuple(value.shape)}"
    size = f" of {len(value)}" if isinstance(value, tuple | list | Mapping) else ""
    return type(value).__name__ + size


def _kind(value: Any) -> str:
    name = "tensor" if isinstance(value, Tensor) else type(value).__name__
    return f"{'an' if name[:1].lower() in 'aeiou' else 'a'} {name}"
