"""Whether a model still has the modules and parameters that its networks were found in."""

from __future__ import annotations

import itertools
import operator

import torch
from torch import nn

from ..errors import CocktailError
from ..graph.unsupported import is_scripted
from ..utils.norms import Norm

__all__ = ["Structure"]


class Structure:
    """The modules of a model that hold parameters or running statistics, and the names of these.

    Args:
        model: As the networks were found in it.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        # Ends every list below and every chain in unchanged(). map() stops at the shorter of two: a list that grew or
        # shrank then compares something with this end, and differs without being counted.
        self._end = (self,)
        self._record()

    def _modules(self) -> dict[str, nn.Module]:
        # TorchScript modules have their parts and tensors outside Python, where nobody can replace them.
        return {path: m for path, m in self._model.named_modules() if not is_scripted(m)}

    def _record(self) -> None:
        modules = self._modules()
        self._children = [m._modules for m in modules.values()]
        self._submodules = [*itertools.chain.from_iterable(map(dict.values, self._children)), self]
        self._tables = [m._parameters for m in modules.values()]
        self._keys = [*itertools.chain.from_iterable(self._tables), self]
        self._parameters = [*itertools.chain.from_iterable(map(dict.values, self._tables)), self]
        self._owners = {path: m for path, m in modules.items() if _tensors(m)}
        self._shapes = {path: {n: t.shape for n, t in _tensors(m).items()} for path, m in self._owners.items()}

    def unchanged(self) -> bool:
        """Whether every module and every parameter is the same object; fast, because all loops run in C."""
        submodules = itertools.chain(itertools.chain.from_iterable(map(dict.values, self._children)), self._end)
        keys = itertools.chain(itertools.chain.from_iterable(self._tables), self._end)
        parameters = itertools.chain(itertools.chain.from_iterable(map(dict.values, self._tables)), self._end)
        return (
            all(map(operator.is_, submodules, self._submodules))
            and all(map(operator.is_, keys, self._keys))
            and all(map(operator.is_, parameters, self._parameters))
        )

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


def _tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """A module's own parameters and, of a norm, its running statistics."""
    out: dict[str, torch.Tensor] = {n: p for n, p in module._parameters.items() if p is not None}
    if isinstance(module, Norm) and module.running_mean is not None:
        out.update({n: b for n, b in module._buffers.items() if b is not None})
    return out


def _same_tensors(old: nn.Module, new: nn.Module) -> bool:
    before, now = _tensors(old), _tensors(new)
    return before.keys() == now.keys() and all(now[n] is t for n, t in before.items())


def _described(path: str, module: nn.Module) -> str:
    return f"{path!r} ({type(module).__name__})" if path else f"the model itself ({type(module).__name__})"
