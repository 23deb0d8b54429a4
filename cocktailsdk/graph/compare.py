"""Comparing two models in float64 on weights of unit scale: what every check of equality is made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from .output_tensors import tensors_of
from .unsupported import hookable

__all__ = [
    "EXACT",
    "NARROWED",
    "SINGLE",
    "Precision",
    "RefuseEmptyHeads",
    "doubled",
    "failing_module",
    "first_difference",
    "leaves_of",
    "narrowed",
    "randomise",
    "relative_error",
    "tensors_in",
]

EXACT = 1e-9
"""Largest relative error allowed in float64."""

SINGLE = 1e-6
"""The same where the model itself casts to float32 on the way."""

NARROWED = 1e-5
"""The same where a kernel has no float64, and sums in float32."""


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
                # Gain 1 by fan-in: values stay of unit scale through any depth, so that a relative error of 1e-9 means
                # something.
                p.copy_(normal(p, max(p[0].numel(), 1) ** -0.5))
        for name, b in model.named_buffers():
            if name.endswith("running_mean"):
                # Statistics of an untrained model are 0 and 1, under which a norm that is cut wrongly would go
                # unnoticed.
                b.copy_(normal(b, 0.1))
            elif name.endswith("running_var"):
                b.copy_(uniform(b, 0.5, 1.5))


def doubled(inputs: Any, generator: torch.Generator) -> Any:
    """Inputs in float64; a constant tensor (zeros, say) would show nothing, so it becomes noise."""

    def convert(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            return leaf
        if leaf.numel() > 1 and bool((leaf == leaf.flatten()[0]).all()):
            return torch.randn(leaf.shape, generator=generator, dtype=torch.float64).to(leaf.device)
        return leaf.double()

    return tree_map(convert, inputs)


def leaves_of(output: Any) -> list[Tensor]:
    """The floating-point tensors that a model returned, in order."""
    return [t for t in tensors_of(output) if t.is_floating_point()]


def tensors_in(output: Any) -> list[Tensor]:
    """Detached copies of these tensors."""
    return [t.detach().clone() for t in leaves_of(output)]


def relative_error(got: Sequence[Tensor], want: Sequence[Tensor], dense: Sequence[Tensor]) -> float:
    """The largest relative error; infinite where shapes differ or values are not finite."""
    if len(got) != len(want) or any(g.shape != w.shape for g, w in zip(got, want, strict=False)):
        return float("inf")
    worst = 0.0
    for g, w, d in zip(got, want, dense, strict=True):
        # Relative to the masked output, but not below rounding of the dense one; 1e-300 avoids 0 / 0.
        scale = max(float(w.norm()), 1e-12 * float(d.norm()), 1e-300)
        error = float((g - w).norm()) / scale
        # `error == error` is False for NaN, which max() would otherwise drop.
        worst = max(worst, error if error == error else float("inf"))
    return worst


class Precision(TorchDispatchMode):
    """Notices whether a float64 model computes something in less, and lets kernels that have no float64 do so.

    Attributes:
        single: Whether something was float32.
        narrowed: Whether a kernel had no float64 (grouped matrix products have none), so that it was given float32.
    """

    def __init__(self) -> None:
        super().__init__()
        self.single = self.narrowed = False

    @property
    def limit(self) -> float:
        """The largest relative error to allow."""
        return NARROWED if self.narrowed else SINGLE if self.single else EXACT

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        try:
            out = func(*args, **kwargs)
        except RuntimeError as error:
            # Kernels report a missing dtype only in words: "not implemented for 'Double'", "expected ... float64".
            if "Double" not in str(error) and "float64" not in str(error):
                raise
            out = tree_map(_wide, func(*tree_map(_single, args), **tree_map(_single, kwargs)))
            self.single = self.narrowed = True
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, Tensor) and t.is_floating_point() and t.dtype != torch.float64 and t.numel() > 1:
                self.single = True
        return out


class RefuseEmptyHeads(TorchFunctionMode):
    """While it is entered, attention without heads raises a ``ValueError``.

    The verification tries a slim module with several numbers of heads. All but one are wrong, and zero may be among
    them. With ``enable_gqa=True`` PyTorch 2.11 divides by that zero, which kills the process (SIGFPE). Later versions
    return zeros.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            operands = (*args[:3], *(kwargs.get(name) for name in ("query", "key", "value")))
            if any(isinstance(t, Tensor) and t.dim() > 3 and t.shape[-3] == 0 for t in operands):
                raise ValueError("attention without heads")
        return func(*args, **kwargs)


def narrowed(inputs: Any) -> Any:
    """Inputs in float32."""
    return tree_map(_single, inputs)


def _single(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype == torch.float64 else value


def _wide(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.dtype == torch.float32 else value


def _record(model: nn.Module, args: Any, kwargs: Any) -> list[tuple[str, list[Tensor], list[Tensor]]]:
    """Records inputs and outputs of every module, in order of completion, until the model ends or raises."""
    records: list[tuple[str, list[Tensor], list[Tensor]]] = []
    with suppress(Exception), ExitStack() as hooks:  # only used to see how far it came
        for name, m in hookable(model):

            def record(_m: nn.Module, inputs: Any, out: Any, name: str = name) -> None:
                records.append((name, tensors_in(inputs), tensors_in(out)))

            hooks.enter_context(m.register_forward_hook(record))
        with Precision():
            model(*args, **kwargs)
    return records


def failing_module(model: nn.Module, args: Any, kwargs: Any) -> str:
    """Path of the innermost module that raises."""
    entered: list[str] = []
    with suppress(Exception), ExitStack() as hooks:
        for name, m in hookable(model):
            hooks.enter_context(m.register_forward_pre_hook(lambda _m, _i, name=name: entered.append(name)))
            hooks.enter_context(m.register_forward_hook(lambda _m, _i, _o: entered.pop() and None))
        with Precision():
            model(*args, **kwargs)
        return ""
    return entered[-1] if entered else ""


def first_difference(
    masked: nn.Module,
    slim: nn.Module,
    args: Any,
    kwargs: Any,
    expected_of: Callable[[str, Tensor, bool], Tensor] = lambda _path, value, _is_input: value,
) -> str:
    """Path of the first module to finish whose output differs although its first input does not.

    Args:
        masked: The masked model.
        slim: The slim one.
        args: Positional inputs of both.
        kwargs: Keyword inputs of both.
        expected_of: From a module's path, a tensor of the masked model, and whether it is an input of the module (or
            an output), the part of that tensor which the slim model has.
    """
    masked_records: dict[str, list[tuple[list[Tensor], list[Tensor]]]] = {}
    for name, inputs, out in _record(masked, args, kwargs):
        masked_records.setdefault(name, []).append((inputs, out))

    def differs(name: str, slim_values: list[Tensor], masked_values: list[Tensor], is_input: bool) -> bool:
        if not slim_values or not masked_values:
            return False
        expected = expected_of(name, masked_values[0], is_input)
        same_shape = expected.shape == slim_values[0].shape
        return same_shape and relative_error(slim_values[:1], [expected], [expected]) > SINGLE

    first_wrong = ""
    for name, inputs, out in _record(slim, args, kwargs):
        masked_inputs, masked_outputs = masked_records[name].pop(0) if masked_records.get(name) else ([], [])
        if differs(name, out, masked_outputs, False):
            if not differs(name, inputs, masked_inputs, True):
                return name
            first_wrong = first_wrong or name
    return first_wrong
