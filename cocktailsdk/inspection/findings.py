"""The findings of an inspection, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ..graph import Kept, Stay

__all__ = ["ChannelGroup", "Eligibility", "Findings", "Layer", "Saving", "Slice"]


@dataclass(frozen=True)
class Eligibility:
    """Whether a pattern may touch a layer.

    Attributes:
        eligible: Whether it may, by default.
        reason: Why not; empty where it may.
    """

    eligible: bool
    reason: str = ""


@dataclass(frozen=True)
class Layer:
    """A weight that is contracted with activations.

    Attributes:
        name: The parameter's name.
        module: Path of the module that owns it.
        op: ``"conv"``, ``"conv_transpose"``, ``"linear"``, ``"matmul"``; in a model whose graph is not known, the
            module's class.
        shape: The parameter's shape.
        params: Its number of elements.
        flops: FLOPs (2 x multiply-adds) of all its uses in one forward pass on the example inputs.
        role: ``"first convolution"``, ``"classifier"`` or nothing.
        unstructured: Whether single weights may go.
        nm: Whether N:M runs fit.
        coverage: For M = 2, 4, 8, 16 the share of its elements that lie in full runs of M input channels.
        channel: Whether any of its output channels may go.
        groups: Names of the channel groups that its output channels belong to.
        reads: Names of the channel groups that its input channels belong to.
        axes: Its output and its input axis; empty where the graph is not known.
    """

    name: str
    module: str
    op: str
    shape: tuple[int, ...]
    params: int
    flops: int
    role: str
    unstructured: Eligibility
    nm: Eligibility
    coverage: Mapping[int, float]
    channel: Eligibility
    groups: tuple[str, ...]
    reads: tuple[str, ...] = ()
    axes: tuple[int, ...] = ()


@dataclass(frozen=True)
class Slice:
    """The positions of one tensor that a group covers.

    Attributes:
        tensor: The parameter or buffer.
        module: Class of the module that owns it.
        axes: The axes along which units vary.
        kind: ``"rows"`` (outputs of a weight), ``"columns"`` (inputs of a weight) or ``"entries"``.
        per_unit: Positions along these axes that go with one unit.
        positions: Positions that belong to the group's units.
        of: Positions that there are.
        stay: Positions that belong to no group's units, and stay.
    """

    tensor: str
    module: str
    axes: tuple[int, ...]
    kind: str
    per_unit: int
    positions: int
    of: int
    stay: int


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that go together, and among which a ratio is chosen.

    Attributes:
        name: Its name.
        units: Number of units; a unit goes or stays as one.
        channels: Channels that a unit stands for, in the widest place.
        rows: Weights that lose output channels with it.
        entries: Biases, norm weights, statistics and other tensors that lose entries.
        columns: Weights that lose input channels.
        kind: ``"attention heads"``, ``"grouped-query units"``, ``"head channels"`` (the same channels of every head),
            ``"expert channels"`` (the same channels of every expert), ``"residual stream"`` (channels that several
            weights add into), or ``"channels"``.
        unit: What one unit is, in words.
        slices: Tensor by tensor, what goes.
        params: Parameters that go with the first unit alone.
        flops: FLOPs that go with the first unit alone.
    """

    name: str
    units: int
    channels: int
    rows: tuple[str, ...]
    entries: tuple[str, ...]
    columns: tuple[str, ...]
    kind: str = "channels"
    unit: str = "a channel"
    slices: tuple[Slice, ...] = ()
    params: int = 0
    flops: int = 0


@dataclass(frozen=True)
class Saving:
    """The parameters and FLOPs that a pattern would leave.

    Attributes:
        pattern: The pattern's registered name.
        subnet: The subnetwork that is counted: half of what the pattern may touch is gone.
        params: Parameters that are not zero or are left.
        flops: FLOPs as dense kernels run them; only channels make them fewer.
        nonzero_flops: FLOPs by parameters that are left.
        coverage: Share of all parameters that the pattern may touch.
    """

    pattern: str
    subnet: str
    params: int
    flops: int
    nonzero_flops: int
    coverage: float


@dataclass(frozen=True)
class Findings:
    """The fields of an :class:`Inspection`; `why` and the drawing read these. They are described there."""

    model: str
    inputs: tuple[str, ...]
    followed: bool
    layers: tuple[Layer, ...]
    groups: tuple[ChannelGroup, ...]
    kept: tuple[Kept, ...]
    params: int
    flops: int
    savings: tuple[Saving, ...]
    stays: tuple[Stay, ...] = ()
    modules: tuple[str, ...] = field(default=(), repr=False)
    tensors: Mapping[str, tuple[int, ...]] = field(default_factory=dict, repr=False)
    proven: bool = False

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        out = asdict(self)
        del out["modules"], out["tensors"]
        return out
