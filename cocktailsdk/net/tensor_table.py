"""A model's parameters and buffers by name."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..utils.fsdp import is_sharded, local, rows_of
from .structure import Structure

__all__ = ["Slot", "TensorTable"]

Slot = tuple[dict[str, Tensor], str]
"""Where a tensor is: a module's own table (``_parameters`` or ``_buffers``) and the key in it."""


class TensorTable:
    """A model's parameters and buffers by name, found without walking the model each time.

    Args:
        model: The model.

    Attributes:
        slots: By name, where each tensor is. A tensor is read from its module at every access, because
            ``load_state_dict(assign=True)`` or ``module.to()`` may put another one there.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model, self._structure = model, Structure(model)
        self.slots = self._find_slots()

    def _find_slots(self) -> dict[str, Slot]:
        slots: dict[str, tuple[Any, str]] = {}
        for path, module in self._model.named_modules():
            for table in (module._parameters, module._buffers):
                for name, t in table.items():
                    if t is not None:
                        slots[f"{path}.{name}".lstrip(".")] = (table, name)
        return slots

    def module(self, path: str) -> nn.Module:
        """The module at a path."""
        return self._model.get_submodule(path)

    def check(self) -> None:
        """Check that the model still has the modules and parameters that it had.

        Raises:
            CocktailError: Modules or parameters were added, removed or replaced; says which.
        """
        if self._structure.check():
            self.slots = self._find_slots()

    def __getitem__(self, name: str) -> Tensor:
        """The tensor; of one that FSDP2 shards, the local shard."""
        return local(self.registered(name))

    def registered(self, name: str) -> Tensor:
        """The tensor as its module has it: a ``DTensor`` where FSDP2 shards it."""
        table, key = self.slots[name]
        return table[key]

    def part(self, name: str, mask: Tensor) -> Tensor:
        """A mask that broadcasts to a tensor, narrowed to the rows of the local shard."""
        tensor = self.registered(name)
        # Shards are rows of the first axis: a mask without that axis, or with size 1 there, fits every shard as it is.
        if not is_sharded(tensor) or mask.ndim < tensor.ndim or mask.shape[0] != tensor.shape[0]:
            return mask
        return mask[rows_of(tensor)]

    @property
    def sharded(self) -> bool:
        """Whether FSDP2 shards any of them."""
        return any(is_sharded(table[key]) for table, key in self.slots.values())

    def __contains__(self, name: str) -> bool:
        return name in self.slots
