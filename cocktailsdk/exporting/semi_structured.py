"""2:4 kernels on CUDA: which linear layers could use them, which do, and what that saves.

Zeros alone save nothing. NVIDIA's sparse tensor cores do, for matrices of certain sizes and dtypes in which every four
consecutive weights along the inputs hold two zeros; ``torch.sparse.to_sparse_semi_structured`` packs such weights.
Convolutions have no such kernel in PyTorch.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ExportFailed
from ..net.subnet_model import SubnetModel
from .deviation import deviation, limit_for
from .example_inputs import Inputs
from .plain_outputs import named_outputs

__all__ = ["Eligibility", "SemiStructuredReport", "eligible_linears", "to_semi_structured"]

N, M = 2, 4
MULTIPLES: dict[torch.dtype, tuple[int, int]] = {
    torch.float16: (32, 64),
    torch.bfloat16: (32, 64),
    torch.int8: (32, 128),
}
"""Outputs and inputs must be multiples of these, whichever of PyTorch's two backends (CUTLASS, cuSPARSELt) there is."""


@dataclass(frozen=True)
class Eligibility:
    """One linear layer.

    Attributes:
        module: Its path.
        shape: Outputs and inputs.
        reason: Why no 2:4 kernel can run it; empty where one can.
        used: Whether one runs it.
        dense_ms: Measured with a dense kernel; ``None`` where it was not.
        sparse_ms: Measured with a 2:4 kernel.
    """

    module: str
    shape: tuple[int, ...]
    reason: str = ""
    used: bool = False
    dense_ms: float | None = None
    sparse_ms: float | None = None

    @property
    def eligible(self) -> bool:
        """Whether a 2:4 kernel can run it."""
        return not self.reason


@dataclass(frozen=True)
class SemiStructuredReport:
    """The layers of a subnetwork that can use 2:4 kernels, and the time that saves.

    Attributes:
        subnet: Its name.
        dtype: What it computes in.
        device: Where it was measured.
        layers: Its linear layers.
        other_zeros: Weights that hold 2:4 zeros but are no linear layer's, so that no kernel uses them.
        error: Largest difference of an output from the same network with dense kernels, relative to its magnitude.
    """

    subnet: str
    dtype: str
    device: str
    layers: tuple[Eligibility, ...]
    other_zeros: tuple[str, ...]
    error: float

    @property
    def eligible(self) -> int:
        """Layers that a 2:4 kernel can run."""
        return sum(layer.eligible for layer in self.layers)

    @property
    def used(self) -> int:
        """Layers that one runs: those that it was faster on."""
        return sum(layer.used for layer in self.layers)

    def lines(self) -> list[str]:
        """In words."""
        out = [
            f"{self.subnet} in {self.dtype} on {self.device}: of {len(self.layers)} linear layers {self.eligible} can "
            f"run on 2:4 kernels, {self.used} do"
        ]
        for layer in self.layers:
            if layer.dense_ms is not None and layer.sparse_ms is not None:
                verdict = "used" if layer.used else "not used, it is no faster"
                out.append(
                    f"  {layer.module}: {layer.dense_ms:.3f} ms dense, {layer.sparse_ms:.3f} ms 2:4 "
                    f"({layer.dense_ms / layer.sparse_ms:.2f} times as fast); {verdict}"
                )
            else:
                out.append(f"  {layer.module}: {layer.reason or 'not measured'}")
        if self.other_zeros:
            out.append(f"zeros that no kernel uses: {', '.join(self.other_zeros)}")
        return out


def eligible_linears(model: nn.Module, dtype: torch.dtype = torch.float16) -> list[Eligibility]:
    """For every linear layer whether a 2:4 kernel could run it. Needs no GPU.

    Args:
        model: Holds plain tensors, zeros where it is sparse.
        dtype: What it is going to compute in.

    Returns:
        The layers in the order of the model's modules, each with a reason if not.
    """
    # A sparse weight replaces the parameter in one module; the other module would keep the dense one. parameters()
    # gives a shared one only once, so each module's own table is counted.
    tied = Counter(id(p) for m in model.modules() for p in m._parameters.values() if p is not None)
    out = []
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear):
            weight = module.weight
            reason = "its weight is shared with another module" if tied[id(weight)] > 1 else ""
            out.append(Eligibility(path, tuple(weight.shape), reason or _why_not(weight.detach(), dtype)))
    return out


def _why_not(weight: Tensor, dtype: torch.dtype) -> str:
    if dtype not in MULTIPLES:
        known = ", ".join(_name(d) for d in MULTIPLES)
        return f"there is no 2:4 kernel for {_name(dtype)}, only for {known}"
    rows, columns = MULTIPLES[dtype]
    outputs, inputs = weight.shape
    if outputs % rows or inputs % columns or not weight.numel():
        return f"{outputs} x {inputs} is no multiple of {rows} x {columns}"
    # Fewer than N non-zero weights in a run are as good: the kernel stores two and multiplies zeros.
    fullest = int((weight.reshape(outputs, -1, M) != 0).sum(-1).max())
    return "" if fullest <= N else f"{fullest} of some {M} consecutive weights are not zero"


def to_semi_structured(
    net: SubnetModel,
    name: str,
    *,
    dtype: torch.dtype = torch.float16,
    device: str | torch.device = "cuda",
    repeats: int = 30,
    always: bool = False,
) -> tuple[nn.Module, SemiStructuredReport]:
    """A copy of a subnetwork whose 2:4 linear layers run on sparse tensor cores, where that is faster.

    Every eligible layer is timed both ways on what it is given in a forward pass on the example inputs.

    Args:
        net: The net; it is left as it was.
        name: A subnetwork with 2:4 zeros: ``"2:4"``, ``"channel@0.5+2:4"``.
        dtype: What to compute in: float16, bfloat16.
        device: A CUDA device of compute capability 8.0 or newer.
        repeats: Timed runs of a layer.
        always: Use the sparse kernel wherever it can run, even where it is slower.

    Returns:
        The model, in eval mode, and what was found.

    Raises:
        ExportFailed: The device has no 2:4 kernels, no layer can use one, or the result computes something else.
        SubnetError: There is no such subnetwork.
    """
    device = torch.device(device)
    if device.type != "cuda" or not torch.cuda.is_available() or torch.cuda.get_device_capability(device) < (8, 0):
        raise ExportFailed(
            f"2:4 kernels need an NVIDIA GPU of compute capability 8.0 or newer; {device} is none. Elsewhere the zeros "
            "of a 2:4 network change neither its speed nor its memory"
        )
    if net.example is None:
        raise ExportFailed("layers are timed on the example inputs: set net.example = (args, kwargs)")
    name = net.subnet(name).name
    model = net.slim(name).eval().to(device, dtype)
    layers = eligible_linears(model, dtype)
    if not any(layer.eligible for layer in layers):
        reasons = dict.fromkeys(layer.reason for layer in layers) or {"it has no linear layer": None}
        raise ExportFailed(f"no layer of {name!r} can run on a 2:4 kernel: {'; '.join(reasons)}")
    inputs = Inputs.of(net.model, *net.example)

    def moved(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.to(device, dtype if value.is_floating_point() else value.dtype)

    args, kwargs = torch.utils._pytree.tree_map(moved, (inputs.args, inputs.kwargs))
    with torch.no_grad():
        wanted = named_outputs(model(*args, **kwargs))
        inputs_of = _layer_inputs(model, [layer.module for layer in layers if layer.eligible], args, kwargs)
        layers = [
            _measured(model.get_submodule(layer.module), layer, inputs_of, repeats, always) if layer.eligible else layer
            for layer in layers
        ]
        error, _ = deviation(
            {n: t.cpu() for n, t in named_outputs(model(*args, **kwargs)).items()},
            {n: t.cpu() for n, t in wanted.items()},
        )
    if not error <= limit_for({dtype}):
        raise ExportFailed(
            f"{name!r} with 2:4 kernels computes something else: the largest difference is {error:.1e} of the output's "
            f"magnitude, allowed {limit_for({dtype}):.0e}"
        )
    device_name = torch.cuda.get_device_name(device)
    return model, SemiStructuredReport(name, _name(dtype), device_name, tuple(layers), _others(model), error)


def _measured(
    module: nn.Module, layer: Eligibility, inputs_of: Mapping[str, Tensor], repeats: int, always: bool
) -> Eligibility:
    """Time a layer both ways, and leave it the quicker one."""
    assert isinstance(module, nn.Linear)
    if layer.module not in inputs_of:
        return replace(layer, reason="it is not called on the example inputs")
    x, dense = inputs_of[layer.module], module.weight
    # requires_grad=False: the packed tensor has no gradient.
    sparse = nn.Parameter(torch.sparse.to_sparse_semi_structured(dense.detach().contiguous()), requires_grad=False)

    def run(weight: Tensor) -> Callable[[], Tensor]:
        return lambda: nn.functional.linear(x, weight, module.bias)

    dense_ms, sparse_ms = _milliseconds([run(dense), run(sparse)], repeats)
    used = always or sparse_ms < dense_ms
    if used:
        module.weight = sparse
    return replace(layer, used=used, dense_ms=dense_ms, sparse_ms=sparse_ms)


def _milliseconds(calls: Iterable[Callable[[], Tensor]], repeats: int) -> list[float]:
    """Medians, by turns."""
    calls = list(calls)
    seen: list[list[float]] = [[] for _ in calls]
    # Both kernels by turns, so that clock changes of the GPU hit both; the first 5 runs warm up caches and autotuning.
    for turn in range(repeats + 5):
        for call, times in zip(calls, seen, strict=True):
            torch.cuda.synchronize()
            began = time.perf_counter()
            call()
            torch.cuda.synchronize()
            if turn >= 5:
                times.append(1e3 * (time.perf_counter() - began))
    return [median(times) for times in seen]


def _layer_inputs(model: nn.Module, paths: list[str], args: Any, kwargs: Any) -> dict[str, Tensor]:
    """The first input of each module in one forward pass."""
    recorded: dict[str, Tensor] = {}
    hooks = [
        model.get_submodule(path).register_forward_pre_hook(
            lambda _m, inputs, path=path: recorded.setdefault(path, inputs[0]) and None
        )
        for path in paths
    ]
    try:
        model(*args, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    return recorded


def _others(model: nn.Module) -> tuple[str, ...]:
    """Weights with zeros in them that are no linear layer's."""
    linear = {f"{path}.weight".lstrip(".") for path, m in model.named_modules() if isinstance(m, nn.Linear)}
    return tuple(
        n for n, p in model.named_parameters() if n not in linear and p.ndim > 1 and bool((p.detach() == 0).any())
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
