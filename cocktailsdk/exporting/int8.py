"""int8 by the runtimes' own quantizers, and how far it is from the network before."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ExportFailed
from ..utils.nested import default_forward
from ..utils.optional import require
from .deviation import deviation
from .export_report import Int8Report
from .formats import Format, Job, Run
from .openvino_file import in_a_thread_of_its_own
from .program import first_line, quiet

__all__ = ["Data", "quantize"]

Feeds = list[dict[str, Tensor]]


@dataclass(frozen=True)
class Data:
    """The data that a network is quantized and evaluated on.

    Attributes:
        calibration: Batches from which the ranges of activations are taken.
        evaluation: Batches on which the metric is measured.
        metric: ``metric(output, target)``, scores of a batch; accuracy if ``None``.
    """

    calibration: Iterable[Any] | None = None
    evaluation: Iterable[Any] | None = None
    metric: Callable[[Any, Any], Tensor] | None = None


def quantize(kind: Format, job: Job, file: Path, data: Data) -> Int8Report:
    """Quantize a file in place.

    Args:
        kind: Its format.
        job: What it was written from.
        file: The float network, which the int8 one replaces.
        data: See :class:`Data`.

    Raises:
        ExportFailed: The format has no quantizer, it failed or quantized nothing, or it needs calibration data.
    """
    quantizers = {".onnx": _onnx, ".xml": _openvino}
    if kind.suffix not in quantizers:
        raise ExportFailed(
            f"int8 is made by a runtime's own quantizer, and {kind.suffix} has none here: export to "
            f"{' or '.join(quantizers)} (onnxruntime.quantization, nncf)"
        )
    run = kind.runner(file, job)
    assert run is not None
    feeds = [_filled(job, batch) for batch in data.calibration] if data.calibration is not None else []
    judged = feeds or [job.inputs.named()]
    wanted = [run(feed) for feed in judged]
    before = _metric(run, job, data)
    # The session is dropped before its file is replaced, which Windows refuses while the file is open.
    del run
    method, quantizer = quantizers[kind.suffix](job, file, feeds)
    run = kind.runner(file, job)
    assert run is not None
    apart = [deviation(run(feed), want) for feed, want in zip(judged, wanted, strict=True)]
    # A quantizer that matches nothing returns the float network without an error. Vectors are left out: quantized
    # models have int8 zero points in any case.
    weights = sum(t.dtype in (torch.int8, torch.uint8) and t.ndim > 1 for _, t in kind.constants(file))
    if not weights:
        raise ExportFailed(f"{quantizer} found nothing in {job.subnet!r} of {type(job.model).__name__} to quantize")
    return Int8Report(
        method=method,
        quantizer=quantizer,
        weights=weights,
        metric=_metric(run, job, data),
        metric_float=before,
        largest=max(a for a, _ in apart),
        mean=sum(b for _, b in apart) / len(apart),
    )


def _onnx(job: Job, file: Path, feeds: Feeds) -> tuple[str, str]:
    onnxruntime = require("onnxruntime", "int8 for ONNX", error=ExportFailed)
    quantization = require("onnxruntime.quantization", "int8 for ONNX", error=ExportFailed)
    shape_inference = require("onnxruntime.quantization.shape_inference", "int8 for ONNX", error=ExportFailed)
    # onnxruntime recommends static quantization for convolutions; the dynamic one below covers MatMul and Gemm.
    if not feeds and _convolves(job.model):
        raise ExportFailed(
            f"int8 of {type(job.model).__name__} needs calibration data, since most of its weights are convolutions': "
            "give calibration=, some batches of inputs"
        )
    prepared, made = file.with_suffix(".prepared.onnx"), file.with_suffix(".int8.onnx")
    try:
        with quiet(), _unadvised():
            # ONNX's own shape inference is enough, and the symbolic one would need sympy.
            shape_inference.quant_pre_process(str(file), str(prepared), skip_symbolic_shape=True)
            _forget_shapes_of_weights(prepared)
            if feeds:
                quantization.quantize_static(
                    str(prepared),
                    str(made),
                    _Reader(feeds),
                    per_channel=True,
                    weight_type=quantization.QuantType.QInt8,
                    activation_type=quantization.QuantType.QUInt8,
                )
            else:
                quantization.quantize_dynamic(
                    str(prepared), str(made), op_types_to_quantize=["MatMul", "Gemm"], per_channel=True
                )
    except Exception as error:
        raise ExportFailed(f"onnxruntime.quantization failed on {job.subnet!r} ({first_line(error)})") from error
    # External data of a model above 2 GB lies in files that begin with the model's name.
    for leftover in [*file.parent.glob(f"{prepared.name}*"), *file.parent.glob(f"{file.name}*")]:
        leftover.unlink()
    made.rename(file)
    return ("static" if feeds else "dynamic"), f"onnxruntime.quantization {onnxruntime.__version__}"


def _forget_shapes_of_weights(file: Path) -> None:
    """The quantizer transposes weights, and then falls over the shapes that are noted for them."""
    onnx = require("onnx", "int8 for ONNX", error=ExportFailed)
    model = onnx.load(file)
    weights = {t.name for t in model.graph.initializer}
    remaining = [v for v in model.graph.value_info if v.name not in weights]
    del model.graph.value_info[:]
    model.graph.value_info.extend(remaining)
    onnx.save(model, file)


def _openvino(job: Job, file: Path, feeds: Feeds) -> tuple[str, str]:
    nncf = require("nncf", "int8 for OpenVINO", error=ExportFailed)
    openvino = require("openvino", "int8 for OpenVINO", error=ExportFailed)
    if not feeds:
        raise ExportFailed("int8 for OpenVINO needs calibration data: give calibration=, some batches of inputs")
    made = file.with_suffix(".int8.xml")
    try:
        with quiet(), redirect_stdout(io.StringIO()):  # it draws bars
            model = openvino.Core().read_model(file)
            dataset = nncf.Dataset([{n: t.numpy() for n, t in feed.items()} for feed in feeds])
            # nncf compiles the model to calibrate it; see `in_a_thread_of_its_own`.
            quantized = in_a_thread_of_its_own(lambda: nncf.quantize(model, dataset))
            openvino.save_model(quantized, made, compress_to_fp16=False)
            del model, quantized
    except Exception as error:
        raise ExportFailed(f"nncf failed on {job.subnet!r} ({first_line(error)})") from error
    made.rename(file)
    # The .xml finds its weights by its own name with the suffix .bin.
    made.with_suffix(".bin").rename(file.with_suffix(".bin"))
    return "static", f"nncf {nncf.__version__}"


class _Reader:
    """Feeds as onnxruntime's calibration asks for them."""

    def __init__(self, feeds: Feeds) -> None:
        self._feeds, self._at = feeds, iter(feeds)

    def get_next(self) -> Mapping[str, Any] | None:
        feed = next(self._at, None)
        return None if feed is None else {n: t.contiguous().numpy() for n, t in feed.items()}

    def rewind(self) -> None:
        self._at = iter(self._feeds)

    def set_range(self, start_index: int, end_index: int) -> None:
        self._at = iter(self._feeds[start_index:end_index])

    def __len__(self) -> int:
        return len(self._feeds)


def _filled(job: Job, batch: Any) -> dict[str, Tensor]:
    """A batch's inputs by name, found as training and evaluation do."""
    seen: list[dict[str, Tensor]] = []

    def take(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        seen.append(dict(inputs))
        return {"output": next(iter(inputs.values()))}

    default_forward(_Running(take, job), batch)
    return seen[0]


def _convolves(model: nn.Module) -> bool:
    convolutions = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Conv1d | nn.Conv2d | nn.Conv3d))
    return 2 * convolutions > sum(p.numel() for p in model.parameters() if p.ndim > 1)


def _metric(run: Run, job: Job, data: Data) -> float | None:
    if data.evaluation is None:
        return None
    from ..training.metrics import accuracy, mean_score

    metric = data.metric or accuracy
    return mean_score(_Running(run, job), data.evaluation, default_forward, metric).number


class _Running(nn.Module):
    """A runtime's network, called as the model is."""

    def __init__(self, run: Run, job: Job) -> None:
        super().__init__()
        self._run, self._job = run, job

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = self._run(self._job.inputs.filled(args, kwargs))
        return next(iter(out.values())) if len(out) == 1 else out


@contextmanager
def _unadvised() -> Iterator[None]:
    """The quantizer gives advice through Python's root logger."""

    def silent(record: logging.LogRecord) -> bool:
        return record.levelno > logging.WARNING

    root = logging.getLogger()
    # A filter on the logger sees only what is logged to the root itself, so other packages' warnings still appear.
    root.addFilter(silent)
    try:
        yield
    finally:
        root.removeFilter(silent)
