"""Which elements of a model a slim copy still holds, and whether the copy equals the masked model.

For slim models that were not cut along a coupling: nothing is known of them but what is left of each tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor, nn

from ..errors import SlimError, described
from ..graph.compare import (
    Precision,
    doubled,
    failing_module,
    first_difference,
    randomise,
    relative_error,
    tensors_in,
)
from ..graph.copies import duplicate_in_double
from ..net.target_modules import some_of
from ..utils.modes import evaluating

__all__ = ["Inputs", "Where", "check_equal", "filled", "named_tensors"]

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of one forward pass."""

Where = Mapping[str, Int64[Tensor, "..."]]
"""For each parameter and buffer of a slim model, the positions of its elements in the original's, flattened."""


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers under all of their names."""
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}


def filled(slim: nn.Module, model: nn.Module, where: Where) -> nn.Module:
    """The slim model with what is left of a model's values, of its dtypes, and in its modes."""
    values, modules = named_tensors(model), dict(model.named_modules(remove_duplicate=False))
    for name, t in named_tensors(slim).items():
        value = values[name]
        # By .data, which may change shape and dtype: the parameter stays the same object, so ties stay ties.
        t.data = value.detach().flatten()[where[name].flatten()].view(t.shape).clone()
        if isinstance(t, nn.Parameter):
            t.grad = None
            t.requires_grad_(value.requires_grad)
    for path, module in slim.named_modules(remove_duplicate=False):
        module.training = modules[path].training
    return slim


def check_equal(model: nn.Module, slim: nn.Module, where: Where, inputs: Inputs, what: str, otherwise: str) -> None:
    """Compares a slim model with the masked one in float64, on randomised weights of unit scale.

    The masked model is the original in which exactly the elements that are gone are zero.

    Args:
        model: The original; not altered.
        slim: Its slim copy, whose values are overwritten.
        where: What is left of each tensor.
        inputs: Arguments of one forward pass.
        what: What the slim model is, for messages.
        otherwise: What else can be done, for messages.

    Raises:
        SlimError: They differ in value or shape, or the slim model does not run.
    """
    generator = torch.Generator().manual_seed(0)
    args, kwargs = doubled(inputs, generator)
    masked = duplicate_in_double(model)
    randomise(masked, generator)
    with evaluating(masked, clear_caches=True), evaluating(slim, clear_caches=True), torch.no_grad():
        filled(slim, masked, where)
        slim.eval()
        with Precision() as precision:
            dense = tensors_in(masked(*args, **kwargs))
            _mask(masked, where)
            want = tensors_in(masked(*args, **kwargs))
        try:
            with precision:
                got = tensors_in(slim(*args, **kwargs))
        except Exception as error:
            at = failing_module(slim, args, kwargs)
            raise SlimError(
                f"{what} does not run ({described(error)}); it fails in {at or 'its own forward'!r}. "
                f"Exclude what makes its channels (exclude_modules=[...]); {otherwise}",
                module=at,
            ) from error
        shapes = [[list(t.shape) for t in tensors] for tensors in (want, got)]
        if shapes[0] != shapes[1]:
            raise SlimError(
                f"{what} returns {shapes[1]} where the model returns {shapes[0]}: channels of its output went. Exclude "
                f"the layers that make it (exclude_modules=[...]); {otherwise}"
            )
        error_found, limit = relative_error(got, want, dense), precision.limit
        if not error_found <= limit:
            at = first_difference(masked, slim, args, kwargs)
            raise SlimError(
                f"{what} computes something else than the masked model: relative error {error_found:.1e}, allowed "
                f"{limit:.0e}. The first module of unchanged width that differs is {at or 'the model itself'!r}."
                f"{_narrowed_norms(masked, slim)} Otherwise: {otherwise}.",
                module=at,
            )


def _mask(model: nn.Module, where: Where) -> None:
    """Zeroes every element that is gone under any of its tensor's names."""
    gone: dict[int, tuple[Tensor, Tensor]] = {}
    for name, t in named_tensors(model).items():
        if where[name].numel() < t.numel():
            present = torch.zeros(t.numel(), dtype=torch.bool, device=t.device)
            present[where[name].flatten()] = True
            _, others = gone.get(id(t), (t, present))
            gone[id(t)] = (t, present & others)
    for t, present in gone.values():
        t.mul_(present.view(t.shape).to(t))


def _narrowed_norms(masked: nn.Module, slim: nn.Module) -> str:
    """In words, the norms that take statistics over channels and have fewer of them now."""
    wide = dict(masked.named_modules())
    narrowed = [
        f"{path} ({type(m).__name__})"
        for path, m in slim.named_modules()
        if (isinstance(m, nn.LayerNorm | nn.GroupNorm) or "RMSNorm" in type(m).__name__)
        and any(p.shape != q.shape for p, q in zip(m.parameters(), wide[path].parameters(), strict=True))
    ]
    if not narrowed:
        return ""
    return (
        f" Some norms now take their statistics over the channels left, where the masked model counts those that are "
        f"zero: {some_of(narrowed, 4)}."
    )
