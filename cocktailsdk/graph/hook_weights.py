"""Weights that hooks compute before each pass and keep as plain attributes, from before parametrizations."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress

import torch
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

__all__ = ["hook_weights", "refresh_hook_weights"]


def hook_weights(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The weights that hooks of ``torch.nn.utils`` compute from a module's current tensors, by the attribute's name.

    No step of power iteration is taken.
    """
    with torch.no_grad():
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, BasePruningMethod):  # has no public name for the attribute (torch 2.14)
                yield hook._tensor_name, hook.apply_mask(module)
            elif isinstance(hook, WeightNorm):
                yield hook.name, hook.compute_weight(module)
            elif isinstance(hook, SpectralNorm):
                yield hook.name, hook.compute_weight(module, do_power_iteration=False)


def refresh_hook_weights(modules: Iterable[nn.Module]) -> None:
    """Computes these attributes again. After tensors were cut or changed in place, the attributes are out of date."""
    for module in modules:
        with suppress(
            RuntimeError
        ):  # a hook that reads what a later one computes may find it in another dtype or shape
            for name, value in hook_weights(module):
                setattr(module, name, value)
