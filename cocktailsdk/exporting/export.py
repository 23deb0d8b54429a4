"""Subnetworks as files of other runtimes, each checked before it is kept."""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Callable, Iterable
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import ExportFailed, SlimError
from ..io.folders import move_files
from ..net.subnet_model import SubnetModel
from .deviation import deviation, limit_for
from .example_inputs import Inputs
from .export_report import ExportReport
from .formats import Format, Job, format_of
from .int8 import Data, quantize
from .plain_outputs import named_outputs
from .program import first_line
from .torch_files import own_tensors
from .zeros import Zeros, count_zeros, masked_zeros

__all__ = ["export_subnet", "job_of"]

log = logging.getLogger(__name__)


def export_subnet(
    net: SubnetModel,
    name: str,
    path: str | PathLike[str],
    *,
    int8: bool = False,
    calibration: Iterable[Any] | None = None,
    evaluation: Iterable[Any] | None = None,
    metric: Callable[[Any, Any], Tensor] | None = None,
    dynamic_batch: bool = True,
) -> ExportReport:
    """Write one subnetwork for another runtime; see :meth:`cocktailsdk.CocktailNet.export`."""
    target = Path(path).expanduser()
    kind = format_of(target)
    name = net.subnet(name).name
    if target.is_dir():
        raise ExportFailed(f"{target} is a folder; give the name of a file in it, ending in {kind.suffix}")
    job = job_of(net, name, dynamic_batch=dynamic_batch)
    wanted = masked_zeros(net, name, job.model)
    target.parent.mkdir(parents=True, exist_ok=True)
    # In the target's own folder, so that os.replace stays on one file system and is atomic.
    made = Path(tempfile.mkdtemp(prefix=f".{target.name}.new-", dir=target.parent))
    try:
        file = made / target.name
        try:
            kind.write(job, file)
            error = _checked(kind, job, file)
        except (ExportFailed, SlimError):
            raise
        except Exception as failed:  # of another package
            raise ExportFailed(
                f"{name!r} could not be exported to {kind.suffix} ({first_line(failed)}); nothing was kept"
            ) from failed
        quantized = quantize(kind, job, file, Data(calibration, evaluation, metric)) if int8 else None
        zeros = _zeros(kind, job, file, wanted)
        size = sum(f.stat().st_size for f in made.iterdir())
        move_files(made, target)
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return ExportReport(
        subnet=name,
        path=target,
        format=kind.title,
        runtime=kind.runtime(),
        bytes=size,
        parameters=sum(p.numel() for p in job.model.parameters()),
        parameters_dense=sum(p.numel() for p in net.model.parameters()),
        inputs=job.inputs.names,
        outputs=job.outputs,
        dynamic_batch=dynamic_batch and kind.suffix != ".safetensors",
        error=error,
        zeros=zeros,
        int8=quantized,
    )


def job_of(net: SubnetModel, name: str, *, dynamic_batch: bool = True) -> Job:
    """A subnetwork made ready for exporting: slim, on the CPU, in eval mode, with its inputs and outputs named.

    Raises:
        SubnetError: There is no such subnetwork.
        SlimError: It cannot be slimmed.
        ExportFailed: There are no example inputs, or it does not run.
    """
    if net.example is None:
        raise ExportFailed(
            "exporting runs the model, but the bundle could not describe its example inputs: set "
            "net.example = (args, kwargs)"
        )
    model = net.slim(name).cpu().eval()
    inputs = Inputs.of(net.model, *net.example)
    try:
        outputs = tuple(_torch(model, inputs))
    except Exception as error:
        raise ExportFailed(f"{name!r} does not run on the example inputs on the CPU ({first_line(error)})") from error
    if not outputs:
        raise ExportFailed(f"{type(model).__name__} returns no tensors; there is nothing to export")
    return Job(model, inputs, dynamic_batch, name, outputs)


def _torch(model: torch.nn.Module, inputs: Inputs) -> dict[str, Tensor]:
    with torch.no_grad():
        return {n: t.detach() for n, t in named_outputs(model(*inputs.args, **inputs.kwargs)).items()}


def _checked(kind: Format, job: Job, file: Path) -> float:
    """The largest difference between what was written and torch.

    Raises:
        ExportFailed: It is too large.
    """
    run = kind.runner(file, job)
    if run is None:
        constants, own = dict(kind.constants(file)), own_tensors(job.model)
        wrong = [n for n, t in own.items() if n not in constants or not _same(constants[n], t)]
        if wrong or set(constants) != set(own):
            raise ExportFailed(f"{file.name} does not hold what was written: {', '.join(wrong[:3])}; nothing was kept")
        return 0.0
    batches = [job.inputs]
    if job.dynamic_batch:
        # Neither the example's size nor the traced one (3): a batch that became a constant of the graph shows here.
        batches += [job.inputs.fresh(n, seed=n) for n in (1, 2, 5)]
    else:
        batches.append(job.inputs.fresh(job.inputs.batch, seed=1))
    dtypes = {t.dtype for t in job.model.state_dict().values() if isinstance(t, Tensor) and t.is_floating_point()}
    limit, worst = limit_for(dtypes), 0.0
    for batch in batches:
        apart, _ = deviation(run(batch.named()), _torch(job.model, batch))
        # `not <=`, since NaN compares false with everything.
        if not apart <= limit:
            raise ExportFailed(
                f"{job.subnet!r} in {kind.runtime()} computes something else than in torch: on a batch of "
                f"{batch.batch} the largest difference is {apart:.1e} of the output's magnitude, allowed {limit:.0e}; "
                "nothing was kept. Another format may hold it: .pt2 is torch's own"
            )
        worst = max(worst, apart)
    return worst


def _zeros(kind: Format, job: Job, file: Path, wanted: dict[str, Tensor]) -> Zeros:
    zeros = count_zeros(wanted, kind.constants(file)) if wanted else Zeros()
    if zeros.missing:
        log.warning(
            "%s holds %d of %d masked weights in another form, so that their zeros could not be counted: %s",
            file.name,
            len(zeros.missing),
            len(wanted),
            ", ".join(zeros.missing[:3]),
        )
    return zeros


def _same(a: Tensor, b: Tensor) -> bool:
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        # As bytes: torch.equal would call -0.0 and 0.0 equal, and NaN unequal to itself.
        and torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))
    )
