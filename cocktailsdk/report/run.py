"""``report.json``: what a run came to, for people's tables and for other programs."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import TrainingError
from ..io.atomic import write_json
from ..printable import all_printable
from .numbers import json_values

if TYPE_CHECKING:
    from torch import nn

    from ..net.costs import SubnetReport
    from ..net.subnet_model import SubnetModel

__all__ = ["REPORT_FILE", "NetworkRow", "RunReport", "dense_bytes", "network_rows", "read_report", "versions"]

REPORT_FILE = "report.json"
FORMAT = 1


@dataclass(frozen=True)
class NetworkRow:
    """One network of a run.

    Attributes:
        name: ``"dense"``, ``"unstructured@0.488"``, ``"2:4"``, ``"channel@0.271"``.
        pattern: ``"dense"`` or its pattern's registered name.
        sparsity: The sparsity asked for.
        sparsity_exact: The sparsity its mask has.
        metric: The metric on the test data; NaN where it was not finite.
        params: Parameters kept.
        flops: FLOPs (2 x multiply-adds) of one forward pass on one example, as dense kernels run them.
        nonzero_macs: Multiply-adds by weights that are not masked.
        held_out: The metric on the held-out data that merging chose by.
        private_bytes: Bytes of its private tensors; they are among ``RunReport.bundle_bytes``.
    """

    name: str
    pattern: str
    sparsity: float
    sparsity_exact: float
    metric: float
    params: int
    flops: int
    nonzero_macs: int = 0
    held_out: float | None = None
    private_bytes: int = 0


@dataclass(frozen=True)
class RunReport:
    """A finished run.

    Attributes:
        networks: Its networks, the dense one first.
        bundle_bytes: Bytes of the bundle's files.
        dense_bytes: Bytes of one checkpoint of the dense network alone.
        seconds: Training time, over all calls.
        metric_name: What ``NetworkRow.metric`` is.
        preset: The preset.
        model: Its model.
        seed: The seed.
        alphas: The shares that merging chose for rounds 2, 3, …
        fingerprint: SHA-256 of the run's configuration.
        environment: Versions and processor.
        metric_mode: ``"max"`` where more of the metric is better, ``"min"`` where less is.
        configuration: What the run was asked to do; empty in reports of older releases, as are the next three.
        history: Losses by epoch and round, held-out metrics by round, and what merging chose, as
            :class:`~cocktailsdk.training.state.history.History` has it.
        masks: What the masks look like, as :func:`~cocktailsdk.report.recorded.mask_record` says.
        kept: What is kept whole and why: ``what``, ``where``, ``reason``.
        format: Version of this layout.
        score: By what masks were ranked and on what data, as ``net.provenance["score"]`` has it; empty where by
            magnitude, and in reports of older releases.
    """

    networks: tuple[NetworkRow, ...]
    bundle_bytes: int
    dense_bytes: int
    seconds: float
    metric_name: str = "accuracy"
    preset: str = ""
    model: str = ""
    seed: int = 0
    alphas: tuple[float, ...] = ()
    fingerprint: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)
    metric_mode: str = "max"
    configuration: Mapping[str, Any] = field(default_factory=dict)
    history: Mapping[str, Any] = field(default_factory=dict)
    masks: Mapping[str, Any] = field(default_factory=dict)
    kept: Sequence[Mapping[str, str]] = ()
    format: int = FORMAT
    score: Mapping[str, Any] = field(default_factory=dict)

    @property
    def passes(self) -> dict[str, int]:
        """By network, the optimizer steps that trained it; empty in reports of older releases."""
        out: dict[str, int] = {}
        for record in self.history.get("rounds", ()):
            for name, count in (record.get("made") or {}).items():
                out[name] = out.get(name, 0) + count
        return out

    @property
    def dense_before(self) -> float | None:
        """The dense network's held-out metric before training, of a run from trained weights."""
        value: float | None = self.history.get("before", {}).get("dense")
        return value

    def to_dict(self) -> dict[str, Any]:
        """As JSON values; a metric that is not finite is ``None``."""
        values: dict[str, Any] = json_values(asdict(self))
        if not self.score:  # as releases before scores wrote it, which do not read the key
            del values["score"]
        return values

    def write(self, folder: Path) -> Path:
        """Write ``report.json`` into a folder, all of it or nothing."""
        path = folder / REPORT_FILE
        write_json(path, self.to_dict())
        return path


def read_report(path: Path) -> RunReport | None:
    """The report of the run in a folder, or in a file; ``None`` where there is none.

    Raises:
        TrainingError: Where there is one that cannot be read.
    """
    if path.is_dir():
        path = path / REPORT_FILE
    if not path.is_file():
        return None
    try:
        data = all_printable(json.loads(path.read_text(encoding="utf-8")))
        if data["format"] != FORMAT:
            raise TrainingError(f"{path} has format {data['format']!r}; this release of cocktailsdk reads {FORMAT}")
        rows = tuple(_row(row) for row in data.pop("networks"))
        alphas, kept = tuple(data.pop("alphas")), tuple(data.pop("kept", ()))
        return RunReport(networks=rows, alphas=alphas, kept=kept, **data)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise TrainingError(f"{path} is no report of a run ({type(error).__name__}: {error}); remove it") from error


def _row(row: dict[str, Any]) -> NetworkRow:
    return NetworkRow(**{**row, "metric": math.nan if row["metric"] is None else row["metric"]})


def network_rows(
    subnets: list[SubnetReport], test: Mapping[str, float], held_out: Mapping[str, float]
) -> tuple[NetworkRow, ...]:
    """The rows of a report.

    Args:
        subnets: From ``net.subnets()``.
        test: Test metric by name.
        held_out: Held-out metric by name.
    """
    return tuple(
        NetworkRow(
            name=s.name,
            pattern=s.pattern,
            sparsity=s.sparsity,
            sparsity_exact=s.sparsity_exact,
            metric=test[s.name],
            params=s.params,
            flops=s.flops,
            nonzero_macs=s.nonzero_macs,
            held_out=held_out.get(s.name),
            private_bytes=s.private_bytes,
        )
        for s in subnets
    )


def dense_bytes(model: nn.Module | SubnetModel) -> int:
    """Bytes of a safetensors checkpoint of a model's ``state_dict``, each tensor once."""
    from safetensors.torch import save

    from ..exporting.torch_files import own_tensors

    inner: Any = getattr(model, "model", model)
    return len(save({name: tensor.cpu().contiguous() for name, tensor in own_tensors(inner).items()}))


def versions() -> dict[str, str]:
    """Versions and processor, for provenance."""
    import torch

    from ..version import __version__

    return {
        "cocktailsdk": __version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "system": platform.system(),
        "threads": str(torch.get_num_threads()),
    }
