"""What an inspection found, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from ..graph import Kept, Stay

if TYPE_CHECKING:
    from .why import Why

__all__ = ["ChannelGroup", "Eligibility", "Inspection", "Layer", "Saving", "Slice"]


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
    """A weight that is multiplied with activations.

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
    """What a group takes of one tensor.

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
    """What a pattern would leave.

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
class Inspection:
    """What :func:`inspect` found.

    Attributes:
        model: The model's class.
        inputs: The example inputs, in words.
        followed: Whether the graph is known; otherwise no channel can go, and ``kept`` says why.
        layers: Every weight, in order of execution.
        groups: The channel groups.
        kept: What is kept whole, and why.
        params: Parameters of the model.
        flops: FLOPs (2 x multiply-adds) of one forward pass on the example inputs.
        savings: What each pattern could save.
        stays: By axis, what of the parameters and buffers in the graph must stay, why, and how the cause comes there.
        modules: Paths of all modules.
        tensors: Parameters and buffers in the model, each with its shape.
        proven: Whether it was shown, by slimming half of every group, that all of them can be slimmed. Models on the
            meta device hold no values to show it on.
    """

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

    def why(self, name: str) -> Why:
        """Whether the channels of a module or parameter can go, with which group, and if not, why they are kept.

        Args:
            name: A module's path or a parameter's name, as in ``named_modules()`` and ``named_parameters()``.

        Returns:
            The answer; ``str()`` of it is a few sentences.

        Raises:
            CocktailError: There is no such module or parameter; the message has the nearest names.

        Example:
            ```python
            print(cocktail.inspect(model, (x,)).why("layer4.2.conv3"))
            ```
        """
        from .why import why

        return why(self, name)

    def to_svg(self, title: str | None = None) -> str:
        """The coupling as a picture: layers in order of execution, a coloured line for each channel group.

        A filled dot on a line makes the group's channels, a ring reads them; grey is kept, with the reason as a
        tooltip. Repeated blocks are drawn once. The same model always gives the same bytes.

        Args:
            title: Stands above; the model's class where none is given.
        """
        from .drawing import draw

        return draw(self, title or self.model)

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        out = asdict(self)
        del out["modules"], out["tensors"]
        return out
