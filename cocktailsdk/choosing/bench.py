"""Every subnetwork measured on this machine."""

from __future__ import annotations

import contextlib
import gc
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from torch import nn

from ..errors import CocktailError, ExportFailed
from ..exporting import export_subnet, format_of, job_of
from ..exporting.example_inputs import Inputs
from ..exporting.semi_structured import to_semi_structured
from ..net.subnet_model import SubnetModel, model_unchanged
from ..patterns import DENSE
from ..utils.devices import device_of
from ..utils.modes import evaluating
from ..utils.nested import to_device
from .deployed_size import deployed_bytes
from .layer_use import layers_used, use_counts
from .memory import peak_bytes
from .profile import DeviceProfile, SubnetCost, Timing, machine_of, pareto_front

__all__ = ["RUNTIMES", "Progress", "bench"]

RUNTIMES = {"torch": "", "onnxruntime": ".onnx", "openvino": ".xml"}
"""What can be measured, and the suffix that is exported for it."""

Progress = Callable[[int, int, str], None]
"""Told what is done, of how many, and what comes next."""


@dataclass
class _Runner:
    """One subnetwork, ready to run.

    Attributes:
        model: What torch runs; ``None`` in other runtimes.
        call: Runs it on inputs.
        used: How many of its layers use what.
        within: What must surround its runs.
    """

    model: nn.Module | None
    call: Callable[[Inputs], object]
    used: dict[str, int]
    within: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext


def bench(
    net: SubnetModel,
    names: Sequence[str] | None = None,
    *,
    batch_sizes: Sequence[int] = (1, 8),
    runtime: str = "torch",
    repeats: int = 20,
    warmup: int = 3,
    keep: DeviceProfile | None = None,
    progress: Progress | None = None,
) -> DeviceProfile:
    """Measure subnetworks as they would be deployed: slim where channels are removed, with their zeros elsewhere, and
    on CUDA with 2:4 kernels in the layers that are faster for them.

    Networks are run by turns, so that what else the machine does hits all alike. On the CPU there are as many threads
    as PyTorch is set to.

    Args:
        net: The net, on the device that is measured; it is left as it was.
        names: Which subnetworks; all that have a mask by default. The dense one is always measured.
        batch_sizes: Examples in a batch.
        runtime: ``"torch"``, ``"onnxruntime"`` or ``"openvino"`` (both on the CPU, through files that are checked).
        repeats: Timed runs of each network and batch size.
        warmup: Runs before.
        keep: An earlier profile, measured with the same settings: its other networks are kept.
        progress: Called with what is done, of how many, and what is done next.

    Raises:
        CocktailError: A number makes no sense, the runtime is not known, there are no example inputs, or ``keep`` was
            measured with other settings.
        SubnetError: There is no such subnetwork.
        SlimError: One cannot be slimmed.
        ExportFailed: One cannot be exported.
    """
    sizes = sorted(set(batch_sizes))
    if not sizes or sizes[0] < 1 or repeats < 1 or warmup < 0:
        raise CocktailError(
            f"a benchmark needs batch sizes and repeats of at least 1, not {list(batch_sizes)} and {repeats}"
        )
    if runtime not in RUNTIMES:
        raise CocktailError(f"no runtime is named {runtime!r}; there are {', '.join(RUNTIMES)}")
    if net.example is None:
        raise CocktailError(
            "measuring runs the model, but the bundle could not describe its example inputs: set "
            "net.example = (args, kwargs)"
        )
    asked = [net.subnet(n).name for n in names] if names is not None else [n for n in net.names if n in net.masks]
    wanted = list(dict.fromkeys([DENSE, *asked]))
    plain = _unmeasured(net, sizes, runtime, repeats)
    if keep is not None:
        keep.updated(plain)  # to refuse before anything is measured
        _check_earlier(net, keep)
    device, example = device_of(net.model), Inputs.of(net.model, *net.example)
    done, total = 0, len(wanted) * (1 + len(sizes) * (warmup + repeats))

    def report_progress(what: str, steps: int = 0) -> None:
        nonlocal done
        done += steps
        if progress is not None:
            progress(done, total, what)

    timings: dict[str, list[Timing]] = {n: [] for n in wanted}
    # without watching operations, which would be timed with them
    unharmed = model_unchanged(net, watch=False)
    with unharmed, evaluating(net.model, clear_caches=True), tempfile.TemporaryDirectory() as folder, torch.no_grad():
        runners: dict[str, _Runner] = {}
        for name in wanted:
            report_progress(f"preparing {name}")
            runners[name] = _runner(net, name, runtime, Path(folder))
            report_progress(f"preparing {name}", 1)
        for size in sizes:
            inputs = example.fresh(size)
            if runtime == "torch":
                args, kwargs = to_device((inputs.args, inputs.kwargs), device)
                inputs = replace(inputs, args=args, kwargs=kwargs)
            seen: dict[str, list[float]] = {n: [] for n in wanted}
            for turn in range(warmup + repeats):
                for name in wanted:
                    report_progress(f"batch {size}: {name}")
                    with runners[name].within():
                        seconds = _seconds(partial(runners[name].call, inputs), device)
                    if turn >= warmup:
                        seen[name].append(seconds)
                    report_progress(f"batch {size}: {name}", 1)
            for name in wanted:
                with runners[name].within():
                    memory = _memory(runners[name], inputs)
                timings[name].append(_timing(size, seen[name], memory))
    rows = [
        SubnetCost(
            name=r.name,
            pattern=r.pattern,
            sparsity=r.sparsity,
            metric=r.metric,
            params=r.params,
            flops=r.flops,
            nonzero_macs=r.nonzero_macs,
            bytes=deployed_bytes(net, r.name),
            timings=tuple(timings[r.name]),
            used=runners[r.name].used,
        )
        for r in net.subnets()
        if r.name in timings
    ]
    front = pareto_front(rows)
    found = replace(plain, networks=tuple(replace(r, front=r.name in front) for r in rows))
    return found if keep is None else keep.updated(found)


def _check_earlier(net: SubnetModel, keep: DeviceProfile) -> None:
    """See that a profile's networks are still those of the net.

    Raises:
        CocktailError: One has other costs, or is gone.
    """
    now = {r.name: (r.flops, r.params) for r in net.subnets()}
    if gone := [n.name for n in keep.networks if now.get(n.name) != (n.flops, n.params)]:
        raise CocktailError(
            f"the earlier profile was measured on another bundle ({', '.join(gone[:3])} differ): measure all networks "
            "anew (no NAME), or write to another file (--out FILE)"
        )


def _unmeasured(net: SubnetModel, sizes: Sequence[int], runtime: str, repeats: int) -> DeviceProfile:
    """The profile of a benchmark that begins: its settings, and the dense network without measurements."""
    device = device_of(net.model)
    timings = tuple(Timing(size, math.nan, math.nan, math.nan, 0) for size in sizes)
    dense = next(r for r in net.subnets() if r.name == DENSE)
    row = SubnetCost(DENSE, DENSE, 0.0, None, dense.params, dense.flops, dense.nonzero_macs, 0, timings)
    return DeviceProfile(
        networks=(row,),
        model=type(net.model).__qualname__,
        runtime=format_of(Path(f"net{RUNTIMES[runtime] or '.pt2'}")).runtime(),
        threads=torch.get_num_threads(),
        repeats=repeats,
        machine=machine_of(str(device) if runtime == "torch" else "cpu"),
    )


def _runner(net: SubnetModel, name: str, runtime: str, folder: Path) -> _Runner:
    if runtime != "torch":
        return _exported(net, name, RUNTIMES[runtime], folder)
    mask = net.masks.get(name)
    if device_of(net.model).type == "cuda" and mask is not None and mask.elements:
        with contextlib.suppress(ExportFailed):  # most networks have no layer for which there is such a kernel
            dtype = next(net.model.parameters()).dtype
            kernels, _ = to_semi_structured(net, name, dtype=dtype, device=device_of(net.model))
            return _torch_runner(net, name, kernels)
    if mask is not None and (mask.removed is not None or mask.experts or mask.dropped(net.coupling)):
        return _torch_runner(net, name, net.slim(name).eval())
    with net.using(name):
        return replace(_torch_runner(net, name, net.model), within=lambda: net.using(name))


def _torch_runner(net: SubnetModel, name: str, model: nn.Module) -> _Runner:
    return _Runner(model, lambda i: model(*i.args, **i.kwargs), use_counts(layers_used(net, name, model)))


def _exported(net: SubnetModel, name: str, suffix: str, folder: Path) -> _Runner:
    file = folder / f"{len(list(folder.iterdir()))}{suffix}"
    export_subnet(net, name, file)
    job = job_of(net, name)
    run = format_of(file).runner(file, job, torch.get_num_threads())
    assert run is not None
    used = use_counts(layers_used(net, name, job.model))
    return _Runner(None, lambda i: run(i.named()), used)


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    _wait(device)
    began = time.perf_counter()
    call()
    _wait(device)
    return time.perf_counter() - began


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _memory(runner: _Runner, inputs: Inputs) -> int | None:
    if runner.model is None:
        return None
    gc.collect()
    return peak_bytes(runner.model, inputs.args, inputs.kwargs)


def _timing(batch: int, seconds: Sequence[float], memory: int | None) -> Timing:
    middle = median(seconds)
    low, _, high = quantiles(seconds, n=4) if len(seconds) > 1 else (middle, middle, middle)
    return Timing(batch, 1e3 * middle, 1e3 * max(low, min(seconds)), 1e3 * high, batch / middle, memory)
