"""A coupling of which every group can be slimmed: what cannot be proven is kept whole."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from ..errors import CocktailError, ExportFailed, SlimError, described
from ..utils.undo import unchanged
from .couple import Pass
from .coupling import Coupling
from .cut import Cutter
from .verify_slim import verify_slim
from .verify_training import TrainingModeError

__all__ = ["couple"]

log = logging.getLogger(__name__)

MOST_PINS = 64
"""Modules kept whole before everything is."""


def couple(
    model: nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    exclude: Callable[[str], bool] | None = None,
    prove: bool = True,
) -> Coupling:
    """Finds a model's weights and which of its channels can only be removed together.

    Args:
        model: Any module; it is run in eval mode, without gradients, and left as it was.
        args: Example positional inputs.
        kwargs: Example keyword inputs.
        exclude: For a module's path, whether its output channels must all stay (its input columns may go).
        prove: Slim half of every group on a randomised copy in float64, and keep whole what cannot be fixed, with the
            reason. Models on the meta device, which hold no values, are never run.

    Returns:
        The coupling.

    Raises:
        ExportFailed: If ``torch.export`` cannot follow the model.
    """
    with unchanged(model):
        try:
            return _coupled(model, args, kwargs, exclude, prove)
        except CocktailError:
            raise
        except Exception as error:  # a model's own code may do anything, and its classes may not even be copied
            raise ExportFailed(
                f"{type(model).__name__} could not be followed ({described(error)}). If the model runs "
                "on the example inputs, exclude the module that this comes from (exclude_modules=[...]) and report it."
            ) from error


def _coupled(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None,
    exclude: Callable[[str], bool] | None,
    prove: bool,
) -> Coupling:
    found = Pass(model, args, kwargs, exclude)
    coupling = found.coupling()
    if not prove or any(p.is_meta for p in model.parameters()):
        return coupling
    failed: set[str] = set()
    tried = False
    # Each failure names a module, which is pinned, and the whole model is verified again: pinning one module changes
    # the groups that the others see.
    for _ in range(MOST_PINS):
        error = _failure(model, coupling, args, kwargs, range(len(coupling.groups)))
        if error is None:
            return coupling
        log.info("kept whole: %s", error)
        if isinstance(error, TrainingModeError) and not found.follows_training and not tried:
            found, tried = Pass(model, args, kwargs, exclude, training=True), True
            if found.follows_training:
                coupling = found.coupling()
                continue
        before = coupling.n_units
        for module in _alike(model, error.module, failed):
            found.pin(module, _reason(error, module))
        coupling = found.coupling()
        # The named module had nothing left to pin, so the groups that fail are searched by bisection.
        if coupling.n_units == before:
            culprits = _culprits(model, coupling, args, kwargs, range(len(coupling.groups)))
            for g in culprits:
                found.pin_units(coupling, g, _reason(error, error.module))
            coupling = found.coupling()
            if coupling.n_units == before:
                break
    found.pin_everything("the slim model could not be shown to equal the masked one")
    return found.coupling()


def _alike(model: nn.Module, module: str | None, failed: set[str]) -> list[str | None]:
    """The module that failed; from the second layer on, that of every layer: a third one would fail too."""
    if not module:
        return [module]

    def role(path: str) -> tuple[str, type]:
        return re.sub(r"\d+", "#", path), type(model.get_submodule(path))

    # Verifying a model of 32 equal layers once for each would take 32 runs; two failures in one role decide for all.
    second = any(role(path) == role(module) for path in failed - {module})
    alike = [path for path, _ in model.named_modules() if role(path) == role(module)] if second else [module]
    failed.update(alike)
    return list(alike)


def _reason(error: SlimError, module: str | None) -> str:
    if isinstance(error, TrainingModeError):
        return f"in training mode {module!r} reads it, and could not be shown to compute the same with fewer channels"
    where = f"in {module!r} " if module else ""
    elsewhere = "" if module == error.module else f", as it could not in {error.module!r}"
    return f"its code {where}could not be fixed for fewer channels{elsewhere}"


def halves(coupling: Coupling, groups: Sequence[int]) -> Bool[Tensor, " units"]:
    """Half of the units of some groups, at random positions."""
    # A fixed seed: the same model has the same coupling in every run. Random positions, since code that cuts the wrong
    # run of channels could pass with the first half.
    generator = torch.Generator().manual_seed(0)
    removed = torch.zeros(coupling.n_units, dtype=torch.bool)
    for i in groups:
        g = coupling.groups[i]
        removed[g.start + torch.randperm(g.size, generator=generator)[: g.size // 2]] = True
    return removed


def _failure(
    model: nn.Module, coupling: Coupling, args: Sequence[Any], kwargs: Mapping[str, Any] | None, groups: Sequence[int]
) -> SlimError | None:
    if not coupling.groups or coupling.trace is None:
        return None
    try:
        verify_slim(model, Cutter(coupling, coupling.trace, halves(coupling, groups)), args, kwargs)
    except SlimError as error:
        return error
    return None


def _culprits(
    model: nn.Module, coupling: Coupling, args: Sequence[Any], kwargs: Mapping[str, Any] | None, groups: Sequence[int]
) -> list[int]:
    """Groups that fail by themselves, found by halving; all of these together where only their combination fails."""
    if len(groups) <= 1:
        return list(groups)
    middle = len(groups) // 2
    parts = [p for p in (groups[:middle], groups[middle:]) if _failure(model, coupling, args, kwargs, p) is not None]
    if not parts:
        return list(groups)
    return [g for p in parts for g in _culprits(model, coupling, args, kwargs, p)]
