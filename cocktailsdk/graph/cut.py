"""Cutting: a copy of a model without some of its channel units, with its modules fixed, not yet verified."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from ..errors import SlimError
from ..utils.modes import evaluating
from .copies import duplicate
from .coupling import Coupling, Trace
from .hook_weights import refresh_hook_weights
from .module_fixes import ModuleFixes, Options, fix_modules

__all__ = ["Cutter"]


@dataclass(frozen=True)
class Cutter:
    """Cuts the same units from models of the same structure.

    Attributes:
        coupling: The structure's coupling.
        trace: Its trace.
        removed: The units that go.
    """

    coupling: Coupling
    trace: Trace
    removed: Bool[Tensor, " units"]

    @property
    def keep(self) -> Bool[Tensor, " units_and_stays"]:
        """For each unit whether it stays. ``STAYS`` indexes the last entry, True: positions of no unit."""
        return torch.cat([~self.removed, torch.ones(1, dtype=torch.bool)])

    def cut(
        self, model: nn.Module, fixes: ModuleFixes | None = None, *, share: Container[str] = ()
    ) -> tuple[nn.Module, Options]:
        """Copies a model without the removed units and fixes the modules of the copy; nothing is checked.

        Args:
            model: The model.
            fixes: Values of attributes that are known.
            share: Names of parameters and buffers whose memory the copy shares with the model. A narrowed tensor is
                shared as a view where the remaining positions are the first ones along each axis.

        Returns:
            The copy, and the attributes that may need other values.
        """
        keep = self.keep
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        # Cut tensors are given to deepcopy as already copied, so that the wide ones never are, and ties are kept.
        memo: dict[int, Any] = {}
        for name, fields in self.coupling.fields.items():
            tensor = tensors[name]
            smaller = tensor.detach()
            copied = name not in share
            for units in fields:
                surviving = keep[units]
                if bool(surviving.all()):
                    continue
                axes = [d for d in range(surviving.dim()) if surviving.shape[d] > 1]
                if len(axes) != 1:
                    raise SlimError(f"{name!r}: its channels vary along {len(axes)} axes at once, which cannot be cut.")
                stays = surviving.flatten().nonzero().flatten()
                # Positions 0 ... n-1: a view of the original's memory will do. Once one axis needed a copy, views save
                # nothing.
                if not copied and 0 < stays.numel() == int(stays[-1]) + 1:
                    smaller = smaller.narrow(axes[0], 0, stays.numel())
                else:
                    smaller, copied = smaller.index_select(axes[0], stays.to(tensor.device)), True
            if smaller.shape != tensor.shape:
                memo[id(tensor)] = _like(tensor, smaller.clone() if copied else smaller)
        for name, tensor in tensors.items():
            if name in share and id(tensor) not in memo:
                memo[id(tensor)] = _like(tensor, tensor.detach())
        slim = duplicate(model, memo)
        refresh_hook_weights(slim.modules())
        # not in train mode, where merely reading a spectral norm's weight changes it
        with evaluating(model, clear_caches=True), evaluating(slim, clear_caches=True):
            return slim, fix_modules(slim, model, self.trace, keep, fixes)


def _like(tensor: Tensor, value: Tensor) -> Tensor:
    """A value as the kind of tensor that another is."""
    return nn.Parameter(value, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value
