"""``.xml`` and ``.bin``: OpenVINO's own format, converted from ONNX."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..errors import ExportFailed
from ..utils.optional import require
from .formats import Job, Run
from .onnx_file import OnnxFormat
from .program import first_line

__all__ = ["OpenVinoFormat", "compiled", "in_a_thread_of_its_own"]

Result = TypeVar("Result")


class OpenVinoFormat:
    """OpenVINO IR; the weights lie beside the ``.xml``, in a ``.bin`` of the same name."""

    suffix = ".xml"
    title = "OpenVINO IR"
    packages: tuple[str, ...] = ("openvino", "onnx", "onnxscript")
    extra = "openvino"

    def write(self, job: Job, file: Path) -> None:
        """Write ONNX beside, convert it without narrowing anything, and remove it again."""
        openvino = _openvino()
        between = file.with_suffix(".onnx")
        OnnxFormat().write(job, between)
        try:
            model = openvino.Core().read_model(between)
            # save_model halves weights to float16 by default (since OpenVINO 2023.0), which the comparison with torch
            # would refuse.
            openvino.save_model(model, file, compress_to_fp16=False)
        except Exception as error:
            raise ExportFailed(
                f"OpenVINO cannot convert {job.subnet!r} of {type(job.model).__name__} ({first_line(error)})"
            ) from error
        finally:
            for made in between.parent.glob(f"{between.name}*"):
                made.unlink()

    def runner(self, file: Path, job: Job, threads: int | None = None) -> Run:
        """A compiled model on the CPU, in the precision in which it was written."""
        return compiled(file, threads)

    def constants(self, file: Path) -> Iterator[tuple[str, Tensor]]:
        """All constants that have an axis."""
        for op in _openvino().Core().read_model(file).get_ops():
            if op.get_type_name() == "Constant" and len(op.get_output_shape(0)):
                # `op.data` is memory of the model, which is freed with it.
                yield op.get_friendly_name(), torch.from_numpy(op.data.copy())

    def runtime(self) -> str:
        """OpenVINO."""
        return f"openvino {_openvino().__version__}"


def _openvino() -> Any:
    return require("openvino", "OpenVINO IR", error=ExportFailed)


def in_a_thread_of_its_own(work: Callable[[], Result]) -> Result:
    """What compiling returns, made where it harms nobody.

    OpenVINO's CPU plugin gives the thread that compiles a stack for signals, and frees it when it likes: Ctrl-C or
    SIGTERM that reaches that thread later, in the middle of training, ends the process with a segmentation fault.
    """
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()


def compiled(file: Path, threads: int | None = None, *, precision: str = "f32") -> Run:
    """A network in OpenVINO, on the CPU.

    Args:
        file: ``.xml`` or ``.onnx``.
        threads: Processor threads.
        precision: ``"f32"``; by itself OpenVINO narrows to bfloat16 on processors that have it.
    """
    openvino = _openvino()
    # LATENCY: one request at a time on all cores, as a benchmark of a single network wants it.
    options: dict[str, object] = {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY"}
    if threads is not None:
        options["INFERENCE_NUM_THREADS"] = threads
    model = in_a_thread_of_its_own(lambda: openvino.Core().compile_model(file, "CPU", options))
    takes = [i.get_any_name() for i in model.inputs]
    gives = [o.get_any_name() for o in model.outputs]

    def run(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        values = model([inputs[n].contiguous().numpy() for n in takes])
        # The request reuses its output buffers in the next call.
        return {n: torch.from_numpy(values[i].copy()) for i, n in enumerate(gives)}

    return run
