"""Slim against masked on one model: what one process of ``run.py`` does.

The check knows nothing of who slimmed. Weights are random, of unit scale and all different, in float64; half of the
channels go; what went is read off the values that are left, and the original with exactly those elements zeroed is the
masked model.
"""

from __future__ import annotations

import copy
import json
import logging
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from contenders import CONTENDERS
from models import Inputs, build, first
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from cocktailsdk.inspection.measuring import measured_flops


def make_unique(model: nn.Module) -> None:
    """Weights of unit fan-in norm (so that a wrong attention scale shows), no two elements alike."""
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.numel() == 0 or not p.is_floating_point():
                continue
            if p.dim() <= 1 or float(p.abs().max()) == 0 or float(p.std()) == 0:
                low = 0.5 if name.endswith("weight") or "gamma" in name else -0.25
                p.copy_(torch.rand(p.shape, generator=g, dtype=p.dtype) * 0.5 + low)
            else:
                p.add_(p.std() * 0.01 * torch.randn(p.shape, generator=g, dtype=p.dtype))
                gain = 2.0 if any(part in name for part in ("q", "k_", "key", "query")) else 1.0
                p.mul_(gain / p.std() / p[0].numel() ** 0.5)
        for name, b in model.named_buffers():
            if name.endswith("running_mean"):
                b.copy_(torch.randn(b.shape, generator=g, dtype=b.dtype) * 0.1)
            elif name.endswith("running_var"):
                b.copy_(torch.rand(b.shape, generator=g, dtype=b.dtype) + 0.5)
            elif b.is_floating_point() and b.dim() >= 2 and bool(torch.isfinite(b).all()):
                b.add_(1e-3 * torch.randn(b.shape, generator=g, dtype=b.dtype))


def flops(model: nn.Module, inputs: Inputs) -> int:
    """FLOPs of one pass, by PyTorch's own counter, which trips over parameters that want gradients and get none."""
    model = copy.deepcopy(model).requires_grad_(False)
    return measured_flops(model, inputs[0], inputs[1])[""]


def zero_what_went(masked: nn.Module, slim: nn.Module) -> None:
    """Zeroes the elements of a model whose values a slim copy of it no longer holds."""
    left = {**dict(slim.named_parameters()), **dict(slim.named_buffers())}
    for name, p in [*masked.named_parameters(), *masked.named_buffers()]:
        changed = name in left and left[name].shape != p.shape
        if changed and p.is_floating_point() and not name.endswith("running_var"):
            p.mul_(torch.isin(p.flatten(), left[name].flatten()).view_as(p))


def check(contender: str, name: str, ratio: float = 0.5) -> dict[str, Any]:
    """One row of the table."""
    row: dict[str, Any] = {"contender": contender, "model": name, "ok": False, "equal": False, "stage": "build"}
    began = time.perf_counter()
    try:
        model, inputs = build(name)
        row["stage"] = "group"
        row.update(CONTENDERS[contender].grouping(model, inputs))
        row["stage"] = "slim"
        _compare(row, CONTENDERS[contender].slim, model.double(), tree_map(_double, inputs), ratio)
    except Exception as error:
        row["error"] = f"{type(error).__name__}: {error}".strip()[:400]
    row["total_s"] = round(time.perf_counter() - began, 1)
    return row


def _double(leaf: Any) -> Any:
    return leaf.double() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf


def _compare(
    row: dict[str, Any],
    slimming: Callable[[nn.Module, Inputs, float], nn.Module],
    model: nn.Module,
    inputs: Inputs,
    ratio: float,
) -> None:
    make_unique(model)
    with torch.no_grad():
        base = first(model(*inputs[0], **inputs[1]))
    masked, whole = copy.deepcopy(model), flops(model, inputs)
    began = time.perf_counter()
    slim = slimming(model, inputs, ratio)
    row["slim_s"] = round(time.perf_counter() - began, 2)
    row["stage"] = "forward"
    with torch.no_grad():
        got = first(slim(*inputs[0], **inputs[1]))
        row["shape_kept"] = got.shape == base.shape
        row["params_kept"] = round(_params(slim) / _params(masked), 4)
        row["flops_kept"] = round(flops(slim, inputs) / whole, 4)
        row["stage"] = "compare"
        zero_what_went(masked, slim)
        want = first(masked(*inputs[0], **inputs[1]))
        if row["shape_kept"]:
            row["error_relative"] = float((got - want).norm() / want.norm().clamp_min(1e-30))
            row["moved"] = float((want - base).norm() / base.norm().clamp_min(1e-30))
            row["equal"] = row["error_relative"] < 1e-6  # float64 throughout shows 1e-9 and better
    row["ok"] = row["flops_kept"] < 0.95
    row["stage"] = "done"


def _params(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    print(json.dumps(check(sys.argv[1], sys.argv[2])))
