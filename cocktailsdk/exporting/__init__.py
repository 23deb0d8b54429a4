"""Subnetworks for other runtimes: ONNX, OpenVINO, ``torch.export``, plain tensors; and 2:4 kernels on CUDA."""

from .export import export_subnet, job_of
from .export_report import ExportReport, Int8Report
from .formats import FORMATS, Format, Job, Run, format_of, register_format
from .onnx_file import OnnxFormat
from .openvino_file import OpenVinoFormat
from .torch_files import ExportedProgramFormat, SafetensorsFormat
from .zeros import Zeros

for _format in (OnnxFormat(), ExportedProgramFormat(), SafetensorsFormat(), OpenVinoFormat()):
    register_format(_format)

__all__ = [
    "FORMATS",
    "ExportReport",
    "Format",
    "Int8Report",
    "Job",
    "Run",
    "Zeros",
    "export_subnet",
    "format_of",
    "job_of",
    "register_format",
]
