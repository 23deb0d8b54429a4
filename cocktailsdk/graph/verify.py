"""The proof at every slimming: slim equals masked in float64, on weights of unit scale."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice, product
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from ..errors import SlimError
from .coupling import Coupling
from .cut import Cutter
from .export import evaluating
from .mend import Mends, Options, as_module, assign, surviving
from .rewrite import rewritten

__all__ = ["EXACT", "SINGLE", "Proof", "apply_masks", "randomise", "verify_slim"]

EXACT = 1e-9
"""Largest relative error allowed in float64."""

SINGLE = 1e-6
"""The same where the model itself casts to float32 on the way."""


def randomise(model: nn.Module, generator: torch.Generator) -> None:
    """Gives every parameter and statistic random values of unit scale, so that no error hides below a tolerance.

    Matrices and kernels have unit gain by fan-in; one-dimensional weights lie in [0.5, 1], biases in [-0.25, 0.25],
    running means around 0 and running variances in [0.5, 1.5].
    """

    def uniform(t: Tensor, low: float, high: float) -> Tensor:
        return torch.rand(t.shape, generator=generator, dtype=torch.float64).mul_(high - low).add_(low).to(t)

    def normal(t: Tensor, scale: float) -> Tensor:
        return torch.randn(t.shape, generator=generator, dtype=torch.float64).mul_(scale).to(t)

    with torch.no_grad():
        for name, p in model.named_parameters():
            if not p.is_floating_point() or p.numel() == 0:
                continue
            if p.dim() <= 1:
                p.copy_(uniform(p, -0.25, 0.25) if name.endswith("bias") else uniform(p, 0.5, 1.0))
            else:
                p.copy_(normal(p, max(p[0].numel(), 1) ** -0.5))
        for name, b in model.named_buffers():
            if name.endswith("running_mean"):
                b.copy_(normal(b, 0.1))
            elif name.endswith("running_var"):
                b.copy_(uniform(b, 0.5, 1.5))


def apply_masks(model: nn.Module, coupling: Coupling, removed: Bool[Tensor, " units"]) -> None:
    """Zeroes, in place, everything that the removed units touch."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with torch.no_grad():
        for name, keep in coupling.masks(removed).items():
            tensors[name].mul_(keep.to(tensors[name]))


@dataclass(frozen=True)
class Proof:
    """What the check found.

    Attributes:
        error: The largest relative error over all outputs.
        mends: What makes the slim model right.
    """

    error: float
    mends: Mends


def verify_slim(
    model: nn.Module, cutter: Cutter, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
) -> Proof:
    """Compares slim and masked on a randomised float64 copy of a model.

    Attributes that could have become several sizes (four heads of four channels, say) are settled on the way, each
    module by its own output.

    Args:
        model: The model; not altered.
        cutter: Makes the slim model.
        args: Example positional inputs.
        kwargs: Example keyword inputs.

    Returns:
        The proof.

    Raises:
        SlimError: If the slim model does not run, or computes something else. The first module that differs is named.
    """
    if not args and not kwargs:
        raise SlimError(
            "a slim model is checked by running it, but there are no example inputs; pass example_inputs=(x,)."
        )
    generator = torch.Generator().manual_seed(0)
    masked = copy.deepcopy(model).to(torch.float64)
    randomise(masked, generator)
    args, kwargs = _doubled((tuple(args), dict(kwargs or {})), generator)
    slim, options = cutter.cut(masked)
    with evaluating(masked), evaluating(slim), torch.no_grad():
        dense = _tensors(masked(*args, **kwargs))
        apply_masks(masked, cutter.coupling, cutter.removed)
        precision = _Precision()
        with precision, _Outputs(masked, options) as outputs:
            want = _tensors(masked(*args, **kwargs))
        try:
            with _Settling(masked, slim, options, outputs, cutter) as settling:
                got = _tensors(slim(*args, **kwargs))
        except Exception as error:
            reason = str(error).splitlines()[0] if str(error) else "no message"
            where = _failing_module(slim, args, kwargs)
            raise SlimError(
                f"the slim {type(model).__name__} does not run ({type(error).__name__}: {reason}); it fails in "
                f"{where or 'its own forward'!r}. An attribute that this module reshapes or splits by could not "
                "be mended: exclude it (exclude_modules=[...]) or register an adapter for its class.",
                module=where,
            ) from error
        worst = _compare(got, want, dense)
        limit = SINGLE if precision.single else EXACT
        if not worst <= limit:
            where = _first_difference(masked, slim, args, kwargs)
            raise SlimError(
                f"the slim {type(model).__name__} computes something else than the masked one: relative error "
                f"{worst:.1e}, allowed {limit:.0e}. The first module that differs is "
                f"{where!r}. Exclude it (exclude_modules=[...]) and report it, "
                "please: this should not happen.",
                module=where,
            )
    return Proof(worst, settling.mends)


class _Outputs:
    """Records what some modules of the masked model are given and return, at their first call."""

    def __init__(self, model: nn.Module, paths: Mapping[str, Any]) -> None:
        self.inputs: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}
        self.seen: dict[str, list[Tensor]] = {}
        self._model, self._paths = model, paths
        self._hooks: list[Any] = []

    def __enter__(self) -> _Outputs:
        for path in self._paths:

            def hook(_m: nn.Module, args: Any, kwargs: Any, out: Any, path: str = path) -> None:
                self.inputs.setdefault(path, (args, kwargs))
                self.seen.setdefault(path, _tensors(out))

            self._hooks.append(self._model.get_submodule(path).register_forward_hook(hook, with_kwargs=True))
        return self

    def __exit__(self, *_: object) -> None:
        for h in self._hooks:
            h.remove()


class _Settling:
    """As the slim model runs, finds for each module the values of its attributes with which it is right."""

    MOST = 128
    """Combinations tried for a module."""

    def __init__(self, masked: nn.Module, slim: nn.Module, options: Options, outputs: _Outputs, cutter: Cutter) -> None:
        self.mends = Mends()
        self._masked, self._slim, self._options, self._outputs, self._cutter = masked, slim, options, outputs, cutter
        self._settled: set[str] = set()
        self._busy: set[str] = set()
        self._code: dict[str, Callable[..., Any]] = {}

    def __enter__(self) -> _Settling:
        for path in self._options:
            module = self._slim.get_submodule(path)
            self._code[path] = module.forward
            module.forward = partial(self._forward, path, module)
        return self

    def __exit__(self, *_: object) -> None:
        for path in self._options:
            del self._slim.get_submodule(path).forward

    def _forward(self, path: str, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        # Children settle while their parent is tried, so each is looked at with the inputs that it really gets.
        if path not in self._settled and path not in self._busy:
            self._busy.add(path)
            try:
                self._try(path, module, args, kwargs)
            finally:
                self._busy.discard(path)
        return self._code[path](*args, **kwargs)

    def _try(self, path: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        names = list(self._options[path])
        first = {name: values[0] for name, values in self._options[path].items()}
        for values in islice(product(*self._options[path].values()), self.MOST):
            chosen = dict(zip(names, values, strict=True))
            assign(module, chosen)
            if self._right(path, lambda: self._code[path](*args, **kwargs)):
                self.mends.attributes[path] = chosen
                self._settled.add(path)
                return
        # No attribute does it: give the module its own code with the right sizes.
        assign(module, first)
        if not path or path not in self._outputs.inputs:  # the model itself stays of the user's own class
            return
        original, inputs = self._masked.get_submodule(path), self._outputs.inputs[path]
        graph = rewritten(original, module, path, inputs, (args, kwargs), self._cutter.trace, self._cutter.keep)
        if graph is None:
            return
        made = as_module(module, graph)
        if self._right(path, lambda: made(*args, **kwargs)):
            self.mends.attributes[path] = first
            self.mends.forwards[path] = graph
            self._settled.add(path)
            self._code[path] = made.forward  # for the rest of this run; the model that is kept gets a module

    def _right(self, path: str, run: Callable[[], Any]) -> bool:
        """Whether a module returns what is left of the masked one's value."""
        try:
            got = _tensors(run())
        except Exception:  # wrong sizes raise all kinds of errors
            return False
        expected = self._expected(path)
        return expected is None or _compare(got[:1], expected, expected) <= SINGLE

    def _expected(self, path: str) -> list[Tensor] | None:
        """What the module should return first: the masked model's value without what is gone."""
        wanted = self._outputs.seen.get(path)
        last = next(
            (n for n in reversed(self._cutter.trace.nodes) if n.module == path or n.module.startswith(path + ".")), None
        )
        if not wanted or last is None or tuple(wanted[0].shape) != last.shape:
            return None
        return [surviving(wanted[0], last, self._cutter.keep)]


def _doubled(inputs: Any, generator: torch.Generator) -> Any:
    """Inputs in float64; a constant tensor (zeros, say) would show nothing, so it becomes noise."""

    def convert(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            return leaf
        if leaf.numel() > 1 and bool((leaf == leaf.flatten()[0]).all()):
            return torch.randn(leaf.shape, generator=generator, dtype=torch.float64).to(leaf.device)
        return leaf.double()

    return tree_map(convert, inputs)


def _tensors(output: Any) -> list[Tensor]:
    if not isinstance(output, (Tensor, list, tuple, dict)) and hasattr(output, "to_tuple"):
        output = output.to_tuple()
    return [t.detach().clone() for t in tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point()]


def _compare(got: Sequence[Tensor], want: Sequence[Tensor], dense: Sequence[Tensor]) -> float:
    """The largest relative error; infinite where shapes differ or values are not finite."""
    if len(got) != len(want) or any(g.shape != w.shape for g, w in zip(got, want, strict=False)):
        return float("inf")
    worst = 0.0
    for g, w, d in zip(got, want, dense, strict=True):
        scale = max(float(w.norm()), 1e-12 * float(d.norm()), 1e-300)
        error = float((g - w).norm()) / scale
        worst = max(worst, error if error == error else float("inf"))
    return worst


class _Precision(TorchDispatchMode):
    """Notices whether a float64 model computes something in less."""

    def __init__(self) -> None:
        super().__init__()
        self.single = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, Tensor) and t.is_floating_point() and t.dtype != torch.float64 and t.numel() > 1:
                self.single = True
        return out


def _record(model: nn.Module, args: Any, kwargs: Any) -> list[tuple[str, list[Tensor]]]:
    """Outputs of every module in order of completion, as far as the model runs."""
    seen: list[tuple[str, list[Tensor]]] = []
    hooks = [
        m.register_forward_hook(lambda _m, _i, out, name=name: seen.append((name, _tensors(out))))
        for name, m in model.named_modules()
    ]
    try:
        model(*args, **kwargs)
    except Exception:  # only used to see how far it came
        return seen
    finally:
        for h in hooks:
            h.remove()
    return seen


def _failing_module(model: nn.Module, args: Any, kwargs: Any) -> str:
    """Path of the innermost module that raises."""
    entered: list[str] = []
    hooks = []
    for name, m in model.named_modules():
        hooks.append(m.register_forward_pre_hook(lambda _m, _i, name=name: entered.append(name)))
        hooks.append(m.register_forward_hook(lambda _m, _i, _o: entered.pop() and None))
    try:
        model(*args, **kwargs)
    except Exception:
        return entered[-1] if entered else ""
    finally:
        for h in hooks:
            h.remove()
    return ""


def _first_difference(masked: nn.Module, slim: nn.Module, args: Any, kwargs: Any) -> str:
    """Path of the first module to finish whose output, where its shape is unchanged, differs."""
    want, got = _record(masked, args, kwargs), _record(slim, args, kwargs)
    for (name, w), (_, g) in zip(want, got, strict=False):
        if w and g and w[0].shape == g[0].shape and _compare(g[:1], w[:1], w[:1]) > SINGLE:
            return name
    return ""
