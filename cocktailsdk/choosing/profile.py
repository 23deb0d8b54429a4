"""Device profiles: what every subnetwork costs on one machine, as JSON."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import Any

from ..errors import CocktailError
from ..io.atomic import write_json
from ..printable import all_printable

__all__ = ["DeviceProfile", "SubnetCost", "Timing", "machine_of", "pareto_front", "read_profile"]

FORMAT = 1
MAX_BYTES = 64 << 20
EQUAL = 0.03
"""Latencies that differ by less count as equal: networks that run the same kernels differ by noise."""


@dataclass(frozen=True)
class Timing:
    """One batch size.

    Attributes:
        batch: Examples in the batch.
        latency_ms: Median milliseconds of a forward pass.
        low_ms: Lower quartile.
        high_ms: Upper quartile.
        throughput: Examples a second.
        memory_bytes: Peak memory of weights, inputs and activations; ``None`` where the runtime does not say.
    """

    batch: int
    latency_ms: float
    low_ms: float
    high_ms: float
    throughput: float
    memory_bytes: int | None = None


@dataclass(frozen=True)
class SubnetCost:
    """What one subnetwork costs.

    Attributes:
        name: Its name.
        pattern: Its pattern.
        sparsity: The sparsity asked for.
        metric: Its metric, if known.
        params: Parameters kept.
        flops: FLOPs of one forward pass on the example inputs, as dense kernels run them.
        nonzero_macs: Multiply-adds by weights that are not masked.
        bytes: Bytes of the plain slim model's tensors.
        timings: By batch size.
        used: How many layers use what: ``{"slim layer": 52, "whole": 2}``.
        front: Whether no other network is both as fast and better; see :func:`pareto_front`.
    """

    name: str
    pattern: str
    sparsity: float
    metric: float | None
    params: int
    flops: int
    nonzero_macs: int
    bytes: int
    timings: tuple[Timing, ...]
    used: Mapping[str, int] = field(default_factory=dict)
    front: bool = False

    def timing(self, batch: int | None = None) -> Timing:
        """Of a batch size; the smallest by default.

        Raises:
            CocktailError: It was not measured.
        """
        if batch is None:
            return self.timings[0]
        for t in self.timings:
            if t.batch == batch:
                return t
        known = ", ".join(str(t.batch) for t in self.timings)
        raise CocktailError(f"the profile has no batch size {batch}; it has {known}")


MACHINE = ("processor", "cores", "device", "machine", "torch")
"""What of a machine two profiles must share to be one."""


@dataclass(frozen=True)
class DeviceProfile:
    """Every subnetwork on one machine.

    Attributes:
        networks: The subnetworks, the dense one first.
        model: The model's class.
        runtime: What ran them, with its version.
        threads: Processor threads.
        repeats: Runs of each network and batch size.
        machine: Processor, device, system and versions.
        format: Version of this layout.
    """

    networks: tuple[SubnetCost, ...]
    model: str
    runtime: str
    threads: int
    repeats: int
    machine: Mapping[str, str] = field(default_factory=dict)
    format: int = FORMAT

    def cost(self, name: str) -> SubnetCost | None:
        """A subnetwork's costs; ``None`` where it was not measured."""
        return next((n for n in self.networks if n.name == name), None)

    def differences(self, other: DeviceProfile) -> list[str]:
        """In which settings another profile was measured differently, as readable lines; its networks aside."""
        mine, theirs = self._settings(), other._settings()
        return [f"{k}: {mine[k]}, now {theirs[k]}" for k in mine if mine[k] != theirs[k]]

    def updated(self, newer: DeviceProfile) -> DeviceProfile:
        """This profile, with what a newer one measured in place of the same networks, and the others kept.

        Args:
            newer: Measured on the same machine, with the same settings; the numbers of repeats may differ.

        Raises:
            CocktailError: Something else differs, or a network is not the one that it was; says what.
        """
        lines = self.differences(newer)
        for n in newer.networks:
            old = self.cost(n.name)
            if old is not None and (old.flops, old.params) != (n.flops, n.params):
                lines.append(f"{n.name}: {old.flops} FLOPs, now {n.flops}")
        if lines:
            raise CocktailError(
                f"the earlier profile was measured differently ({'; '.join(lines[:4])}): use the same settings, "
                "write to another file (--out FILE), or measure all networks anew (no NAME)"
            )
        rows = {n.name: n for n in (*self.networks, *newer.networks)}
        front = pareto_front(list(rows.values()))
        networks = tuple(replace(n, front=n.name in front) for n in rows.values())
        return replace(self, networks=networks, repeats=min(self.repeats, newer.repeats))

    def _settings(self) -> dict[str, Any]:
        batches = ", ".join(str(t.batch) for t in self.networks[0].timings) if self.networks else ""
        return {
            "model": self.model,
            "runtime": self.runtime,
            "threads": self.threads,
            "batch sizes": batches,
            **{k: self.machine.get(k) for k in sorted({*self.machine} & {*MACHINE})},
        }

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)

    def write(self, path: str | PathLike[str]) -> Path:
        """Write the profile, all of it or nothing."""
        target = Path(path).expanduser()
        target.parent.mkdir(parents=True, exist_ok=True)
        write_json(target, self.to_dict())
        return target


def read_profile(path: str | PathLike[str]) -> DeviceProfile:
    """A profile that was written.

    Raises:
        CocktailError: There is none, or it cannot be read.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise CocktailError(f"there is no device profile {file}; cocktail-cli bench BUNDLE measures one")
    if file.stat().st_size > MAX_BYTES:
        raise CocktailError(f"{file} has {file.stat().st_size} bytes; no device profile is this large")
    try:
        data = all_printable(json.loads(file.read_text(encoding="utf-8")))
        if data["format"] != FORMAT:
            raise CocktailError(f"{file} has format {data['format']!r}; this release of cocktailsdk reads {FORMAT}")
        networks = tuple(_network(row) for row in data.pop("networks"))
        profile = DeviceProfile(networks=networks, **data)
        if not networks or not all(n.timings for n in networks):
            raise CocktailError(f"{file} has no measurements; measure again: cocktail-cli bench BUNDLE")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CocktailError(
            f"{file} is no device profile ({type(error).__name__}: {error}); measure it again"
        ) from error
    return profile


def _network(row: Mapping[str, Any]) -> SubnetCost:
    timings = tuple(Timing(**{k: _number(v) for k, v in t.items()}) for t in row["timings"])
    return SubnetCost(**{**row, "timings": timings})


def _number(value: Any) -> Any:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or value < 0):
        raise ValueError(f"{value!r} is no measurement")
    return value


def pareto_front(networks: Sequence[SubnetCost], batch: int | None = None) -> frozenset[str]:
    """Names of the networks that no other one beats.

    One beats another if it is as good and faster, or better and as fast. Good is the metric, or where not all have one
    the non-zero multiply-adds; latencies that differ by less than 3 % count as equal.
    """
    by_metric = all(n.metric is not None for n in networks)

    def good(n: SubnetCost) -> float:
        return n.metric if by_metric and n.metric is not None else float(n.nonzero_macs)

    def beats(a: SubnetCost, b: SubnetCost) -> bool:
        fast, slow = a.timing(batch).latency_ms, b.timing(batch).latency_ms
        if good(a) < good(b):
            return False
        return fast < slow * (1 - EQUAL) or (good(a) > good(b) and fast < slow * (1 + EQUAL))

    return frozenset(n.name for n in networks if not any(beats(other, n) for other in networks))


def machine_of(device: str) -> dict[str, str]:
    """Processor, device, system and versions, for provenance."""
    import torch

    from ..version import __version__

    return {
        "processor": _processor(),
        "cores": str(os.cpu_count() or 1),
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else device,
        "machine": platform.machine(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "cocktailsdk": __version__,
    }


def _processor() -> str:
    known = Path("/proc/cpuinfo")
    if known.is_file():
        for line in known.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
