"""A model's parameters and buffers by name, and whether it still has those that its networks were found in."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from ..errors import CocktailError
from ..graph.unsupported import is_scripted
from ..utils.batchnorm import Norm
from ..utils.fsdp import is_sharded, local, rows_of

__all__ = ["Slot", "TensorTable"]

Slot = tuple[dict[str, Tensor], str]
"""Where a tensor is: a module's own table (``_parameters`` or ``_buffers``) and the key in it."""


class Structure:
    """The modules of a model that hold parameters or running statistics, and the names of these.

    Args:
        model: As the networks were found in it.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        # Ends every iterator of _parts(). map() stops at the shorter of two: a list that grew or shrank then compares
        # something with this end, and differs without being counted.
        self._end = (self,)
        self._record()

    def _modules(self) -> dict[str, nn.Module]:
        # TorchScript modules have their parts and tensors outside Python, where nobody can replace them.
        return {path: m for path, m in self._model.named_modules() if not is_scripted(m)}

    def _record(self) -> None:
        modules = self._modules()
        self._children = [m._modules for m in modules.values()]
        self._tables = [m._parameters for m in modules.values()]
        self._recorded = [list(part) for part in self._parts()]
        self._owners = {path: m for path, m in modules.items() if _tensors(m)}
        self._shapes = {path: {n: t.shape for n, t in _tensors(m).items()} for path, m in self._owners.items()}

    def _parts(self) -> list[Iterator[object]]:
        """The submodules, the names of parameters and the parameters, as they are now."""
        submodules, parameters = map(dict.values, self._children), map(dict.values, self._tables)
        return [itertools.chain(*part, self._end) for part in (submodules, self._tables, parameters)]

    def unchanged(self) -> bool:
        """Whether every module and every parameter is the same object; fast, because the inner loops run in C."""
        return all(all(map(operator.is_, now, then)) for now, then in zip(self._parts(), self._recorded, strict=True))

    def check(self) -> bool:
        """Check that the networks still fit the model.

        Modules that hold neither parameters nor running statistics may come and go, and a module may be replaced by one
        that holds the same tensors (``convert_sync_batchnorm``).

        Returns:
            Whether the model has changed in a way that does no harm.

        Raises:
            CocktailError: A module or parameter was added, removed or replaced; names it.
        """
        if self.unchanged():
            return False
        if (what := self._difference()) is not None:
            raise CocktailError(
                f"the model was changed after sparsify(): {what}. Its networks belong to the model as it was: call "
                "sparsify() again on the changed model (adapters, parametrizations and new layers come before it)"
            )
        self._record()
        return True

    def _difference(self) -> str | None:
        """The first harmful change, in words."""
        modules = self._modules()
        for path, old in self._owners.items():
            new = modules.get(path)
            if new is None:
                return f"{_described(path, old)} is gone"
            if new is not old and not _same_tensors(old, new):
                return f"{_described(path, old)} was replaced by a {type(new).__module__}.{type(new).__name__}"
            now = _tensors(new)
            for name, shape in self._shapes[path].items():
                if name not in now:
                    return f"{_described(path, old)} has no {name!r} any more"
                if now[name].shape != shape:
                    found = f"the shape {tuple(now[name].shape)}, not {tuple(shape)}"
                    return f"{name!r} of {_described(path, old)} has {found} any more"
            if more := now.keys() - self._shapes[path].keys():
                return f"{_described(path, old)} got {min(more)!r}"
        for path, new in modules.items():
            if path not in self._owners and _tensors(new):
                return f"{_described(path, new)} was added"
        return None


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """A module's own parameters and, of a norm, its running statistics."""
    out: dict[str, Tensor] = {n: p for n, p in module._parameters.items() if p is not None}
    if isinstance(module, Norm) and module.running_mean is not None:
        out.update({n: b for n, b in module._buffers.items() if b is not None})
    return out


def _same_tensors(old: nn.Module, new: nn.Module) -> bool:
    before, now = _tensors(old), _tensors(new)
    return before.keys() == now.keys() and all(now[n] is t for n, t in before.items())


def _described(path: str, module: nn.Module) -> str:
    return f"{path!r} ({type(module).__name__})" if path else f"the model itself ({type(module).__name__})"


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
