"""Devices by name: whether there is such a device here, before anything is moved to it."""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
from torch import nn

from ..errors import CocktailError

__all__ = ["available_device", "device_of"]


def device_of(model: nn.Module) -> torch.device:
    """The device of a model's first parameter or buffer."""
    first = next(chain(model.parameters(), model.buffers()), None)
    return first.device if first is not None else torch.device("cpu")


def available_device(device: Any, *, of: str = "device=", error: type[CocktailError] = CocktailError) -> torch.device:
    """The device of a name, which is here and can be used.

    Args:
        device: As ``torch.device`` takes it: ``"cpu"``, ``"cuda"``, ``"cuda:1"``, ``"mps"`` …
        of: How the option is written, for the error: ``"device="``, ``"--device "``.
        error: What is raised.

    Raises:
        CocktailError: There is no such device here, or no device is called so; says which are here, and what to type.
    """
    asked = f"{of}{device}" if of.startswith("-") else f"{of}{str(device)!r}"
    try:
        wanted = torch.device(device)
    except (RuntimeError, TypeError, ValueError):
        raise error(f"{asked} is no device that PyTorch knows; {_here(of)}") from None
    if wanted.type == "cpu":
        return wanted
    count = _count(wanted.type)
    if not count:
        raise error(f"{asked} cannot be used: no {wanted.type} device is available here; {_here(of)}")
    if wanted.index is not None and wanted.index >= count:
        raise error(f"{asked} cannot be used: there is no {wanted} among {count} {wanted.type} devices; {_here(of)}")
    return wanted


def _count(kind: str) -> int:
    """How many devices of a kind are here."""
    if kind == "mps":  # whose module has no is_available()
        return int(torch.backends.mps.is_available())
    module: Any = getattr(torch, kind, None)
    if not (hasattr(module, "is_available") and module.is_available()):
        return 0
    return int(module.device_count())


def _here(of: str) -> str:
    """What can be used here, and what to type."""
    found = ["cpu"]
    for kind in ("cuda", "xpu", "mps"):
        count = _count(kind)
        found += [f"{kind}:{i}" for i in range(count)] if count > 1 else [kind] * count
    best = found[1] if len(found) > 1 else "cpu"
    typed = f"{of}{best}" if of.startswith("-") else f"{of}{best!r}"
    return f"found here: {', '.join(found)}; use {typed}"
