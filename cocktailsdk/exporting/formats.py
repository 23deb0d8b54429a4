"""The formats that a subnetwork can be exported to, by file suffix."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Protocol

from torch import Tensor, nn

from ..errors import ExportFailed
from ..utils.optional import check_installed
from .example_inputs import Inputs
from .program import Traced, program_of

__all__ = ["FORMATS", "Format", "Job", "Run", "format_of", "register_format"]

Run = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
"""Runs an exported network: inputs by name in, outputs by name out, all on the CPU."""


@dataclass
class Job:
    """A network to export.

    Attributes:
        model: The slim model, on the CPU and in eval mode; nobody else has it.
        inputs: Its example inputs.
        dynamic_batch: Whether the batch may have any size.
        subnet: Its name.
        outputs: Names of its outputs.
    """

    model: nn.Module
    inputs: Inputs
    dynamic_batch: bool
    subnet: str
    outputs: tuple[str, ...] = field(default=())

    @cached_property
    def traced(self) -> Traced:
        """Its graph."""
        return program_of(self.model, self.inputs, dynamic_batch=self.dynamic_batch)


class Format(Protocol):
    """One kind of file.

    Attributes:
        suffix: How its name ends: ``".onnx"``.
        title: What it is.
        packages: What must be importable.
        extra: The extra of this package that installs them; empty where none is needed.
    """

    suffix: str
    title: str
    packages: tuple[str, ...] = ()
    extra: str = ""

    def write(self, job: Job, file: Path) -> None:
        """Write the network; beside the file others that belong to it may be written."""
        ...

    def runner(self, file: Path, job: Job, threads: int | None = None) -> Run | None:
        """Load what was written, in the runtime it is for; ``None`` where it holds no graph.

        Args:
            file: What was written.
            job: What it was written from.
            threads: Processor threads; the runtime's own choice if ``None``.
        """
        ...

    def constants(self, file: Path) -> Iterator[tuple[str, Tensor]]:
        """The tensors in the file, read back from it."""
        ...

    def runtime(self) -> str:
        """Name and version of what runs it."""
        ...


FORMATS: dict[str, Format] = {}
"""By suffix."""


def register_format(kind: Format) -> None:
    """Make a format known by its suffix."""
    FORMATS[kind.suffix] = kind


def format_of(path: Path) -> Format:
    """The format that a path's suffix names.

    Raises:
        ExportFailed: None has that suffix, or what it needs is not installed.
    """
    suffix = path.suffix.lower()
    kind = FORMATS.get(suffix)
    if kind is None:
        near = difflib.get_close_matches(suffix, FORMATS, n=1, cutoff=0.5)
        listed = ", ".join(f"{k.suffix} ({k.title})" for k in FORMATS.values())
        hint = f" Did you mean {near[0]}?" if near else ""
        found = f"the suffix {suffix!r}, which no format has" if suffix else "no suffix, which would name the format"
        raise ExportFailed(f"{path.name!r} has {found}.{hint} There are {listed}")
    check_installed(*kind.packages, purpose=f"exporting to {kind.suffix}", extra=kind.extra, error=ExportFailed)
    return kind
