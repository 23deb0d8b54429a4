"""The proof at every slimming: slim equals masked in float64, on weights of unit scale, whatever the model's own are."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from ..errors import SlimError
from .coupling import Coupling
from .export import evaluating

__all__ = ["EXACT", "SINGLE", "apply_masks", "randomise", "verify_slim"]

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


def verify_slim(
    model: nn.Module,
    coupling: Coupling,
    removed: Bool[Tensor, " units"],
    cut: Callable[[nn.Module], nn.Module],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
) -> float:
    """Compares slim and masked on a randomised float64 copy of a model.

    Args:
        model: The model; not altered.
        coupling: Its coupling.
        removed: The units that go.
        cut: Makes the slim model of a copy.
        args: Example positional inputs.
        kwargs: Example keyword inputs.

    Returns:
        The largest relative error over all outputs.

    Raises:
        SlimError: If the slim model does not run, or computes something else. The first module that differs is named.
    """
    if not args and not kwargs:
        raise SlimError("a slim model is checked by running it, but there are no example inputs; pass example_inputs=(x,).")
    generator = torch.Generator().manual_seed(0)
    probe = copy.deepcopy(model).to(torch.float64)
    randomise(probe, generator)
    args, kwargs = _doubled((tuple(args), dict(kwargs or {})), generator)
    slim = cut(probe)
    with evaluating(probe), evaluating(slim), torch.no_grad():
        dense = _tensors(probe(*args, **kwargs))
        apply_masks(probe, coupling, removed)
        precision = _Precision()
        with precision:
            want = _tensors(probe(*args, **kwargs))
        try:
            got = _tensors(slim(*args, **kwargs))
        except Exception as error:
            where = _failing_module(slim, args, kwargs)
            raise SlimError(
                f"the slim {type(model).__name__} does not run ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}); "
                f"it fails in {where}. An attribute that this module reshapes or splits by could not be mended: exclude it "
                "(exclude_modules=[...]) or register an adapter for its class."
            ) from error
        worst = _compare(got, want, dense)
        limit = SINGLE if precision.single else EXACT
        if not worst <= limit:
            where = _first_difference(probe, slim, args, kwargs)
            raise SlimError(
                f"the slim {type(model).__name__} computes something else than the masked one: relative error {worst:.1e}, allowed {limit:.0e}. "
                f"The first module that differs is {where}. Exclude it (exclude_modules=[...]) and report it, please: this should not happen."
            )
    return worst


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
    hooks = [m.register_forward_hook(lambda _m, _i, out, name=name: seen.append((name, _tensors(out)))) for name, m in model.named_modules()]
    try:
        model(*args, **kwargs)
    except Exception:  # only used to see how far it came
        return seen
    finally:
        for h in hooks:
            h.remove()
    return seen


def _failing_module(model: nn.Module, args: Any, kwargs: Any) -> str:
    entered: list[str] = []
    hooks = []
    for name, m in model.named_modules():
        hooks.append(m.register_forward_pre_hook(lambda _m, _i, name=name: entered.append(name)))
        hooks.append(m.register_forward_hook(lambda _m, _i, _o: entered.pop() and None))
    try:
        model(*args, **kwargs)
    except Exception:
        return repr(entered[-1]) if entered and entered[-1] else "the model's own forward"
    finally:
        for h in hooks:
            h.remove()
    return "the model's own forward"


def _first_difference(masked: nn.Module, slim: nn.Module, args: Any, kwargs: Any) -> str:
    want, got = _record(masked, args, kwargs), _record(slim, args, kwargs)
    for (name, w), (_, g) in zip(want, got, strict=False):
        if w and g and w[0].shape == g[0].shape and _compare(g[:1], w[:1], w[:1]) > SINGLE:
            return repr(name or "the model itself")
        # Where channels are gone, sums of squares still agree: what is absent is zero, or is not read any more.
    return "not to be told from module outputs of equal shape"
