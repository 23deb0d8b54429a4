"""Models of transformers as their own classes build them from a configuration, and whether a slim model equals one."""

from __future__ import annotations

import copy
import inspect
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import product
from math import isclose
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from cocktailsdk.graph.compare import Precision, doubled, randomise, relative_error, tensors_in
from cocktailsdk.graph.copies import duplicate_in_double
from cocktailsdk.graph.layers import SlimRMSNorm
from cocktailsdk.graph.rewritten_module import RewrittenModule
from cocktailsdk.utils.modes import evaluating

from .transformers_search import shapes_of

__all__ = ["Builder", "Randomised", "adopt", "eps_of", "folds_of", "reloaded", "same_constants", "scaled"]


class _Weightless(TorchFunctionMode):
    """Weights get no memory; what is made with values (tables of positions) gets its own."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


class Builder:
    """Builds models of one class without memory for their weights, and leaves random numbers undrawn.

    Args:
        like: A model of the class, which may have been built with flags (``add_pooling_layer=False``): these are told
            by the names of its tensors.
    """

    def __init__(self, like: nn.Module) -> None:
        self._cls, self._flags = type(like), dict[str, bool]()
        self._flags = self._flags_of(like)

    def shapes_only(self, config: Any) -> nn.Module:
        """A model whose every tensor is without memory. The configuration becomes the model's own."""
        with torch.random.fork_rng(devices=[]), torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return self._cls(config, **self._flags)

    def with_tables(self, config: Any) -> nn.Module:
        """A model in which what is no weight has its values."""
        with torch.random.fork_rng(devices=[]), _Weightless(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return self._cls(config, **self._flags)

    def _flags_of(self, like: nn.Module) -> dict[str, bool]:
        wanted = shapes_of(like).keys()
        config: Any = like.config
        parameters = inspect.signature(self._cls.__init__).parameters.values()
        names = [p.name for p in parameters if isinstance(p.default, bool)][:4]
        usual = {p.name: p.default for p in parameters if p.name in names}
        for differ in sorted(product((False, True), repeat=len(names)), key=sum):
            self._flags = {n: usual[n] != other for n, other in zip(names, differ, strict=True) if other}
            if shapes_of(self.shapes_only(copy.deepcopy(config))).keys() == wanted:
                return self._flags
        return {}


def reloaded(config: Any) -> Any:
    """A configuration as it is after it was written to a file and read back."""
    made = type(config).from_dict(json.loads(config.to_json_string()))
    _keep_private(made, config)
    return made


def _keep_private(made: Any, of: Any) -> None:
    """What is chosen when a model is loaded, such as the implementation of attention, is in no file."""
    for name, value in vars(of).items():
        if hasattr(value, "to_diff_dict") and hasattr(vars(made).get(name), "to_diff_dict"):
            _keep_private(vars(made)[name], value)
        elif name.startswith("_") and name.endswith("_internal"):
            vars(made)[name] = value


def folds_of(slim: nn.Module) -> dict[str, float]:
    """By path, norms over root mean squares that count absent channels, with the share of channels that is left.

    With C of D channels left, ``x / sqrt(sum(x²) / D + eps) * w`` is ``x / sqrt(mean(x²) + eps·D/C) * (w·sqrt(D/C))``:
    the class's own norm with a larger eps and weight.
    """
    found = {}
    for path, module in slim.named_modules():
        if isinstance(module, SlimRMSNorm) and module.weight is not None:
            found[path] = module.weight.numel() / module.channels
        elif (
            isinstance(module, RewrittenModule)
            and isinstance(getattr(module, "weight", None), nn.Parameter)
            and len(module.shares) == 1
        ):
            found[path] = module.shares[0]
    return {path: share for path, share in found.items() if share != 1}


def scaled(state: Mapping[str, Tensor], folds: Mapping[str, float]) -> dict[str, Tensor]:
    """A model's tensors by name, the weights of folded norms as its class's own norms have them."""
    out = dict(state)
    for path, share in folds.items():
        name = f"{path}.weight"
        if name in out:
            out[name] = (out[name].detach().double() * share**-0.5).to(out[name].dtype)
    return out


def eps_of(module: nn.Module | None) -> dict[str, float]:
    """A module's small constants by the names of its attributes."""
    return {n: v for n, v in vars(module).items() if "eps" in n and isinstance(v, float)} if module is not None else {}


class Randomised:
    """A slim model in float64 on weights of unit scale, what its parts were given, and what they returned.

    Args:
        slim: The slim model; not altered.
        paths: The parts to look at.
        args: Example positional inputs.
        kwargs: Example keyword inputs.
    """

    def __init__(self, slim: nn.Module, paths: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        generator = torch.Generator().manual_seed(0)
        self._slim = slim
        self._model = duplicate_in_double(slim)
        randomise(self._model, generator)
        self._inputs = doubled((tuple(args), dict(kwargs)), generator)
        self._calls: dict[str, tuple[Any, Any, list[Tensor]]] = {}
        precision = Precision()
        with (
            _recorded(self._model, paths, self._calls),
            evaluating(self._model, clear_caches=True),
            torch.no_grad(),
            precision,
        ):
            self._whole = tensors_in(self._model(*self._inputs[0], **self._inputs[1]))
        self.limit = precision.limit

    def ran(self, path: str) -> bool:
        """Whether a part was called at all."""
        return path in self._calls

    def error_of(self, path: str, native: nn.Module, folds: Mapping[str, float]) -> float:
        """How much a part's class, with the same weights, differs from it: a relative error.

        Args:
            path: The part.
            native: A model of its class, without weights; it is given them, in float64.
            folds: Norms whose weights are other ones there.
        """
        own, slim = self._model.get_submodule(path), self._slim.get_submodule(path)
        state = scaled(dict(own.named_parameters(remove_duplicate=False)), folds)
        for at, module in native.named_modules():
            within = f"{at}." if at else ""
            # Put into the module's own tables: its tensors have no memory (meta device) into which to copy.
            for name, old in module._parameters.items():
                if old is not None:
                    module._parameters[name] = nn.Parameter(state[within + name].detach(), requires_grad=False)
            for name, table in module._buffers.items():
                if table is not None:
                    theirs = own.get_submodule(at)._buffers.get(name)
                    before = slim.get_submodule(at)._buffers.get(name)
                    kept = name not in module._non_persistent_buffers_set or _is_same(table, before)
                    module._buffers[name] = theirs if kept else _doubled(table, own)
        args, kwargs, want = self._calls[path]
        with evaluating(native, clear_caches=True), torch.no_grad(), Precision():
            return relative_error(tensors_in(native(*args, **kwargs)), want, want)

    def error_after_adopting(self, path: str, native: nn.Module) -> float:
        """How much the slim model differs from what it was, once a part has what its class would say of itself."""
        adopt(self._model.get_submodule(path), native)
        return relative_error(self._run(), self._whole, self._whole)

    def _run(self) -> list[Tensor]:
        with evaluating(self._model, clear_caches=True), torch.no_grad(), Precision():
            return tensors_in(self._model(*self._inputs[0], **self._inputs[1]))


@contextmanager
def _recorded(
    model: nn.Module, paths: Sequence[str], calls: dict[str, tuple[Any, Any, list[Tensor]]]
) -> Iterator[None]:
    def hook(path: str) -> Any:
        return lambda _m, args, kwargs, out: calls.setdefault(path, (args, kwargs, tensors_in(out))) and None

    hooks = [model.get_submodule(p).register_forward_hook(hook(p), with_kwargs=True) for p in paths]
    try:
        yield
    finally:
        for h in hooks:
            h.remove()


def _is_same(table: Tensor, theirs: Tensor | None) -> bool:
    """Whether a table is the one that a slim model has, in whatever precision that was put."""
    return theirs is not None and table.shape == theirs.shape and bool(torch.equal(table.to(theirs), theirs))


def _doubled(table: Tensor, like: nn.Module) -> Tensor:
    device = next((p.device for p in like.parameters()), table.device)
    return table.to(device, torch.float64 if table.is_floating_point() else table.dtype)


def adopt(slim: nn.Module, native: nn.Module) -> None:
    """Gives a slim model's modules the configurations and counts that those of its class's own model have.

    Args:
        slim: Changed in place: no parameter, and no module is replaced.
        native: A model of its class, of the same widths; its configurations become the slim model's.
    """
    others = dict(native.named_modules())
    for path, module in slim.named_modules():
        other = others.get(path)
        if other is None:
            continue
        for name, value in vars(other).items():
            if hasattr(value, "to_diff_dict") and name in vars(module):
                setattr(module, name, value)
            elif type(module) is type(other) and not name.startswith("_") and name in vars(module):
                own = vars(module)[name]
                if _is_count(value) and type(own) is type(value) and own != value:
                    setattr(module, name, value)


def _is_count(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return 0 < len(value) <= 8 and all(type(v) is int for v in value)
    return type(value) is int


def same_constants(slim: nn.Module, native: nn.Module, folds: Mapping[str, float]) -> str | None:
    """Path of the first module whose small constants are not those that its class's own model has."""
    own = dict(slim.named_modules())
    for path, module in native.named_modules():
        for name, value in eps_of(module).items():
            has = eps_of(own.get(path)).get(name, getattr(own.get(path), "eps", None))
            if isinstance(has, float) and not isclose(value, has / folds.get(path, 1.0), rel_tol=1e-9):
                return path
    return None
