"""Models without the modules of residual branches that are dropped."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from ..graph import Branch
from ..graph.output_tensors import tensors_of
from ..utils.modes import evaluating
from ..utils.undo import unchanged

__all__ = ["Skipped", "close", "without_branches"]

log = logging.getLogger(__name__)


class Skipped(nn.Module):
    """Stands for a module of a residual branch that is gone: holds nothing, and returns zeros in its input's shape.

    Args:
        extras: How many ``None`` the module returned after its result; -1 where that was no tuple.
    """

    def __init__(self, extras: int = -1) -> None:
        super().__init__()
        self.extras = extras

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Takes any arguments; the first tensor of numbers counts."""
        x = next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.is_floating_point())
        y = torch.zeros_like(x)
        return y if self.extras < 0 else (y, *[None] * self.extras)


def without_branches(
    model: nn.Module, branches: Sequence[Branch], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> bool:
    """Takes the modules of dropped branches out of a model, in place; each only if the model computes the same.

    Args:
        model: Its dropped branches are masked.
        branches: Those to take out.
        args: Example positional inputs, for the check.
        kwargs: Example keyword inputs.

    Returns:
        Whether all could be taken out. Where code wants something else of a branch's modules than to be called, it
        stays as it is, masked.
    """
    with evaluating(model):
        with unchanged(model):
            want, returned = _run(model, branches, args, kwargs)
        done = _replaced(model, branches, returned, want, args, kwargs)
        remaining = () if done else [b for b in branches if not _replaced(model, [b], returned, want, args, kwargs)]
    if remaining:
        log.warning("branches stay in the slim model, masked: %s", ", ".join(b.name for b in remaining))
    return not remaining


def _run(
    model: nn.Module, branches: Sequence[Branch], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[list[Tensor], dict[str, list[Any]]]:
    """What the model returns, and its branches' modules, call by call."""
    returned: dict[str, list[Any]] = {path: [] for b in branches for path in b.modules}
    with ExitStack() as hooks, torch.no_grad():
        for path, outputs in returned.items():
            module = model.get_submodule(path)
            hooks.enter_context(module.register_forward_hook(lambda _m, _a, out, to=outputs: to.append(out)))
        return tensors_of(model(*args, **kwargs)), returned


def _replaced(
    model: nn.Module,
    branches: Sequence[Branch],
    returned: Mapping[str, list[Any]],
    want: Sequence[Tensor],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> bool:
    before: dict[str, nn.Module] = {}
    try:
        for b in branches:
            for path in b.modules:
                stand_in = _stand_in(returned[path])
                if stand_in is None or path == "":
                    raise ValueError(f"{path} returns something else than a tensor")
                before[path] = model.get_submodule(path)
                model.set_submodule(path, stand_in.train(before[path].training))
        with unchanged(model), torch.no_grad():
            got = tensors_of(model(*args, **kwargs))
        same = len(got) == len(want) and all(close(g, w) for g, w in zip(got, want, strict=True))
    except Exception as error:  # code that wants something else of a module raises anything
        log.info("branches cannot be taken out as modules: %s", error)
        same = False
    if not same or not branches or not all(b.modules for b in branches):
        for path, module in before.items():
            model.set_submodule(path, module)
        return not branches
    return True


def _stand_in(calls: Sequence[Any]) -> Skipped | None:
    if len(calls) != 1:
        return None
    out = calls[0]
    if isinstance(out, Tensor):
        return Skipped()
    if type(out) is tuple and out and isinstance(out[0], Tensor) and all(v is None for v in out[1:]):
        return Skipped(len(out) - 1)
    return None


def close(got: Tensor, want: Tensor) -> bool:
    """Whether a tensor is the one that the masked model returns, but for rounding."""
    if got.shape != want.shape or got.dtype != want.dtype:
        return False
    scale = float(want.abs().max()) if want.numel() and want.is_floating_point() else 0.0
    return torch.allclose(got, want, rtol=1e-5, atol=1e-6 * scale, equal_nan=True)
