"""``.pt2`` by ``torch.export``, and ``.safetensors`` of the plain slim model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ..io.tensors import read_tensors
from .formats import Format, Job, Run
from .plain_outputs import named_outputs
from .program import quiet

__all__ = ["ExportedProgramFormat", "SafetensorsFormat", "own_tensors"]


def own_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What a checkpoint of a model holds, each tensor once, by the first of its names."""
    seen: set[int] = set()
    out: dict[str, Tensor] = {}
    for name, t in model.state_dict(keep_vars=True).items():
        if isinstance(t, Tensor) and id(t) not in seen:
            seen.add(id(t))
            out[name] = t.detach()
    return out


class ExportedProgramFormat(Format):
    """PyTorch's own graph file; ``torch.export.load(path).module()`` runs it without the model's code."""

    suffix = ".pt2"
    title = "torch.export"

    def write(self, job: Job, file: Path) -> None:
        """Write the program."""
        with quiet():
            torch.export.save(job.traced.program, file)

    def runner(self, file: Path, job: Job, threads: int | None = None) -> Run:
        """Load the program; threads are PyTorch's own."""
        with quiet():
            module = torch.export.load(file).module()
        names, args, kwargs = job.inputs.names, job.inputs.args, job.inputs.kwargs

        def run(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
            values = iter([inputs[n] for n in names])
            # An exported program checks the nesting of its arguments, so the example's structure is filled with the new
            # tensors.
            filled = torch.utils._pytree.tree_map(
                lambda v: next(values) if isinstance(v, Tensor) else v, (args, kwargs)
            )
            with torch.no_grad():
                return named_outputs(module(*filled[0], **filled[1]))

        return run

    def constants(self, file: Path) -> Iterator[tuple[str, Tensor]]:
        """Parameters and buffers of the program."""
        with quiet():
            state = torch.export.load(file).state_dict
        yield from state.items()

    def runtime(self) -> str:
        """PyTorch."""
        return f"torch {torch.__version__}"


class SafetensorsFormat(Format):
    """The slim model's tensors by their names; ``load_state_dict`` of a slim model takes them."""

    suffix = ".safetensors"
    title = "tensors of the plain slim model"

    def write(self, job: Job, file: Path) -> None:
        """Write the tensors."""
        from safetensors.torch import save_file

        # safetensors refuses tensors that share memory or are not contiguous.
        tensors = {n: t.contiguous().clone() for n, t in own_tensors(job.model).items()}
        save_file(tensors, file, {"format": "pt", "subnet": job.subnet, "class": type(job.model).__qualname__})

    def runner(self, file: Path, job: Job, threads: int | None = None) -> Run | None:
        """Nothing: there is no graph in it."""
        return None

    def constants(self, file: Path) -> Iterator[tuple[str, Tensor]]:
        """All tensors."""
        yield from read_tensors(file).items()

    def runtime(self) -> str:
        """Nothing runs it by itself."""
        return f"torch {torch.__version__}"
