"""``.onnx``: written by ``torch.onnx``, run by onnxruntime."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..errors import ExportFailed
from ..utils.optional import require
from .formats import Job, Run
from .program import first_line, quiet

__all__ = ["OnnxFormat"]

LARGEST = 1_900_000_000
"""Bytes of tensors above which they lie in a file of their own; protocol buffers end at 2 GiB."""


class OnnxFormat:
    """Every runtime's common graph file."""

    suffix = ".onnx"
    title = "ONNX"
    packages: tuple[str, ...] = ("onnx", "onnxscript", "onnxruntime")
    extra = "onnx"

    def write(self, job: Job, file: Path) -> None:
        """Write the graph, inputs and outputs under their names, the batch's axis called ``batch``."""
        traced = job.traced
        try:
            with quiet():
                # From the exported program, so that ONNX and .pt2 come from one trace; dynamo=True is the exporter that
                # takes programs.
                made = torch.onnx.export(
                    traced.program,
                    dynamo=True,
                    verbose=False,
                    dynamic_shapes=traced.shapes,  # gives the batch's axis its name
                    input_names=list(job.inputs.names),
                    output_names=list(job.outputs),
                )
        except Exception as error:
            raise ExportFailed(
                f"torch.onnx cannot write {job.subnet!r} of {type(job.model).__name__} ({first_line(error)}); .pt2 "
                "takes what torch.export can follow"
            ) from error
        assert made is not None
        size = sum(t.nbytes for t in job.model.state_dict().values() if isinstance(t, Tensor))
        with quiet():
            # One file where that is possible: it is easier to move than a pair.
            made.save(file, external_data=size > LARGEST)

    def runner(self, file: Path, job: Job, threads: int | None = None) -> Run:
        """A session on the CPU."""
        onnxruntime = require("onnxruntime", "running ONNX files", error=ExportFailed)
        options = onnxruntime.SessionOptions()
        # 3 is ERROR: warnings about unused initializers and graph optimisations mean nothing to users.
        options.log_severity_level = 3
        if threads is not None:
            # One operator at a time, so that `threads` is the number of busy threads.
            options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        loaded = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        takes = [i.name for i in loaded.get_inputs()]
        gives = [o.name for o in loaded.get_outputs()]

        def run(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
            values = loaded.run(None, {n: inputs[n].contiguous().numpy() for n in takes})
            return {n: torch.from_numpy(v) for n, v in zip(gives, values, strict=True)}

        return run

    def constants(self, file: Path) -> Iterator[tuple[str, Tensor]]:
        """Initializers and constants."""
        onnx = require("onnx", "reading ONNX files", error=ExportFailed)
        numpy_helper = require("onnx.numpy_helper", "reading ONNX files", error=ExportFailed)
        graph = onnx.load(file).graph
        for tensor in graph.initializer:
            # to_array may return a read-only view of the file's bytes, of which torch.from_numpy warns.
            yield tensor.name, torch.from_numpy(numpy_helper.to_array(tensor).copy())
        for node in graph.node:
            # A constant may be a node in place of an initializer.
            if node.op_type == "Constant":
                for attribute in node.attribute:
                    if attribute.name == "value" and attribute.t.dims:
                        yield node.output[0], torch.from_numpy(numpy_helper.to_array(attribute.t).copy())

    def runtime(self) -> str:
        """onnxruntime."""
        onnxruntime = require("onnxruntime", "running ONNX files", error=ExportFailed)
        return f"onnxruntime {onnxruntime.__version__}"
