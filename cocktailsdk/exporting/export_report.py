"""The report of an export."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .zeros import Zeros

__all__ = ["ExportReport", "Int8Report"]


@dataclass(frozen=True)
class Int8Report:
    """How an int8 network compares with the one it was quantized from.

    Attributes:
        method: ``"static"`` (calibrated activations) or ``"dynamic"`` (activations quantized as they come).
        quantizer: Name and version.
        weights: Weights that are int8 in the file.
        metric: The int8 network's metric on the evaluation data; ``None`` without any.
        metric_float: The same of the network before.
        largest: Largest difference of an output, relative to the largest magnitude.
        mean: Mean difference, relative to the mean magnitude.
    """

    method: str
    quantizer: str
    weights: int
    metric: float | None
    metric_float: float | None
    largest: float
    mean: float


@dataclass(frozen=True)
class ExportReport:
    """A network that was exported, after it was checked.

    Attributes:
        subnet: Its name.
        path: The file.
        format: What kind of file.
        runtime: What it was checked in, with its version.
        bytes: Of all files that belong to it.
        parameters: Parameters of the plain slim model.
        parameters_dense: Those of the dense model.
        inputs: Names of its inputs.
        outputs: Names of its outputs.
        dynamic_batch: Whether the batch may have any size.
        error: Largest difference from torch that was seen, relative to the largest magnitude of the output.
        zeros: Zeros read back from the file.
        int8: How it was quantized, if it was.
    """

    subnet: str
    path: Path
    format: str
    runtime: str
    bytes: int
    parameters: int
    parameters_dense: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    dynamic_batch: bool
    error: float
    zeros: Zeros
    int8: Int8Report | None = None

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {**asdict(self), "path": str(self.path)}

    def lines(self) -> list[str]:
        """In words."""
        out = [
            f"{self.subnet} as {self.format} in {self.path}: {self.bytes:,} bytes, {self.parameters:,} of "
            f"{self.parameters_dense:,} parameters"
        ]
        out.append(
            f"checked in {self.runtime}: largest relative difference from torch {self.error:.1e}"
            + (", with several batch sizes" if self.dynamic_batch else "")
        )
        z = self.zeros
        if z.wanted:
            out.append(
                f"zeros read back from the file: {z.found:,} of {z.wanted:,} masked weights; they save bytes only "
                "when the file is compressed, and time only where the runtime has kernels for them"
            )
        if z.missing:
            out.append(f"not in the file as they are, but computed into something else: {', '.join(z.missing)}")
        if self.int8 is not None:
            q = self.int8
            out.append(
                f"int8 ({q.method}, {q.quantizer}): {q.weights} weights; differs from the float network by at most "
                f"{100 * q.largest:.2f} %, {100 * q.mean:.2f} % on average"
            )
            if q.metric is not None and q.metric_float is not None:
                out.append(f"metric {q.metric:.4f} in int8, {q.metric_float:.4f} before")
        return out
