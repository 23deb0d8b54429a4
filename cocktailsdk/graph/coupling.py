"""The weights of a model, and which of its channels must be removed together.

These are plain data. They are made by :func:`cocktailsdk.graph.couple` and know nothing
of sparsity: patterns decide *what* to remove, the coupling says what goes with it.

Words: a *unit* is a set of channels that can only be removed together, wherever they
occur. Units are numbered ``0 … n_units-1``. A *group* is a contiguous run of units made by the same
weights, among which a ratio is chosen.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod

import torch
from jaxtyping import Bool, Int64
from torch import Tensor, fx

STAYS = -1
"""In place of a unit's number: this position belongs to something that must stay."""


EXCLUDED = "excluded by the user"
"""Why channels stay that the user keeps."""


@dataclass(frozen=True)
class Weight:
    """A parameter that is contracted with activations (a convolution, a linear layer, …).

    Attributes:
        name: Its name in ``model.named_parameters()`` (of a tied parameter, the first).
        module: Path of the module that owns it (``""`` for the model itself).
        op: ``"conv"``, ``"conv_transpose"``, ``"linear"`` or ``"matmul"``.
        shape: The parameter's shape.
        out_axis: The axis whose positions make output channels.
        in_axis: The axis that is summed over (per convolution group where grouped).
        groups: Convolution groups (1 elsewhere).
        macs: Multiply-adds of all its uses in one forward pass on the example inputs.
        role: ``""``, ``"first convolution"`` or ``"classifier"``: the two kinds that are
            not prunable by default.
        unmaskable: Why zeros of the parameter would not be zeros of what the model multiplies with; empty where they
            would. Such a weight loses channels alone.
    """

    name: str
    module: str
    op: str
    shape: tuple[int, ...]
    out_axis: int
    in_axis: int
    groups: int
    macs: int
    role: str = ""
    unmaskable: str = field(default="", compare=False)

    @property
    def numel(self) -> int:
        """Number of elements."""
        return prod(self.shape)


@dataclass(frozen=True)
class Producer:
    """A weight's axis that makes channels of a group.

    Attributes:
        weight: The parameter's name.
        axis: Its output axis.
        units: For each position along the axis the unit made there, or ``STAYS``.
    """

    weight: str
    axis: int
    units: Int64[Tensor, " out"]


@dataclass(frozen=True)
class Scale:
    """The factor that follows the division of a parameter by its own norm (weight norm, spectral norm).

    Masked as a whole, such a part would be 0 / 0. Where there is a scale the scale is masked in its place, which makes
    the weight zero there. Where there is none, the parameter cannot be masked as a whole.

    Attributes:
        name: The scale's name (``"conv.weight_g"``); empty where there is none.
        axis: The axis along which each position has a norm of its own; ``None`` where all of the parameter has one.
    """

    name: str
    axis: int | None


@dataclass(frozen=True)
class Touch:
    """A tensor's axis (or axes) that loses entries when units of a group go.

    Attributes:
        tensor: Name of the parameter or buffer.
        axes: The axes along which the units vary.
        kind: ``"rows"`` (outputs of a weight), ``"columns"`` (inputs of a weight) or
            ``"entries"`` (biases, norm weights, statistics, position tables …).
    """

    tensor: str
    axes: tuple[int, ...]
    kind: str


@dataclass(frozen=True)
class Group:
    """Units made by the same weights, among which a ratio is chosen.

    Attributes:
        name: Short, readable and unique (``"layer1"``, ``"blocks.0.mlp.fc1"``).
        start: First unit.
        stop: One past the last unit.
        producers: Names of the weights that make its channels.
        touches: Everything that loses entries with a unit, producers' rows included.
        channels: Channels a unit stands for, in the widest place (heads: head_dim).
    """

    name: str
    start: int
    stop: int
    producers: tuple[str, ...]
    touches: tuple[Touch, ...]
    channels: int = 1

    @property
    def size(self) -> int:
        """Number of units."""
        return self.stop - self.start


@dataclass(frozen=True)
class Kept:
    """A part of the model that is not pruned.

    Attributes:
        where: A module path, a parameter's name or an op.
        reason: Why, in one sentence.
    """

    where: str
    reason: str


@dataclass(frozen=True)
class Link:
    """A step of why channels stay: a call ties them to a tensor that is nearer to the cause.

    Attributes:
        op: The call's op.
        module: Path of the module that ran it.
        tensor: The parameter or buffer; empty where the channels are no tensor's own (padding).
        axis: The axis of it.
    """

    op: str
    module: str
    tensor: str
    axis: int


@dataclass(frozen=True)
class Stay:
    """Positions along a tensor's axis that must stay.

    Attributes:
        tensor: Name of the parameter or buffer.
        axis: The axis.
        positions: How many of its positions stay.
        of: How many there are.
        reason: Why, of the first of them: the nearest cause.
        module: Path of the module where the cause lies (``""`` for the model itself).
        chain: The joins that lead from there to the cause; none where the cause is the tensor's own use.
        makers: The weights whose output channels stay together with these, in order of execution.
    """

    tensor: str
    axis: int
    positions: int
    of: int
    reason: str
    module: str
    chain: tuple[Link, ...]
    makers: tuple[str, ...]


@dataclass(frozen=True)
class Contraction:
    """One product of the graph, for counting: a weight's use, or activations with activations.

    Attributes:
        module: Path of the module that ran it.
        weight: The weight's name, or ``None`` where activations meet activations.
        macs: Multiply-adds as a dense kernel runs them.
        factors: Unit fields of activations' dimensions that shrink: the share of multiply-adds left is the
            product over these of the share of their entries left, and of the share of the weight's elements left.
    """

    module: str
    weight: str | None
    macs: int
    factors: tuple[Int64[Tensor, "..."], ...] = ()


@dataclass(frozen=True)
class Branch:
    """A residual branch: an operand of a sum that can be dropped.

    Attributes:
        name: Short, readable and unique (``"blocks.0.attn"``).
        tensors: Parameters that nothing but the branch reads; with all of them zero it adds nothing.
        weights: Those parameters that are contracted with activations.
        modules: Paths of the largest modules that run nothing but the branch, in order of execution.
    """

    name: str
    tensors: tuple[str, ...]
    weights: tuple[str, ...]
    modules: tuple[str, ...]


@dataclass(frozen=True)
class ExpertSet:
    """The experts of one mixture: a router gives each a logit, and the ``top_k`` largest choose who computes.

    Attributes:
        name: Path of the module that holds router and experts (``"model.layers.0.mlp"``).
        module: Path of the module that computes the logits.
        tensors: Parameters with an entry for each expert along their first axis: the weight of the linear layer that
            computes the logits, then the experts' own.
        count: How many experts there are.
        top_k: How many of them each token is given to.
    """

    name: str
    module: str
    tensors: tuple[str, ...]
    count: int
    top_k: int

    @property
    def router(self) -> str:
        """Name of the weight that computes the logits."""
        return self.tensors[0]


@dataclass(frozen=True)
class Node:
    """One call of the exported graph.

    Attributes:
        name: Its name in the graph.
        op: The op's base name.
        module: Path of the module that ran it.
        shape: Its result's shape; ``None`` where it is no tensor.
        units: Its unit fields, broadcastable to the shape.
        inputs: Names of the calls whose results it takes.
        within: Paths of the modules that were running, from the model itself (``""``) to the innermost.
    """

    name: str
    op: str
    module: str
    shape: tuple[int, ...] | None
    units: tuple[Int64[Tensor, "..."], ...]
    inputs: tuple[str, ...] = ()
    within: tuple[str, ...] = ("",)


@dataclass(frozen=True)
class Norm:
    """A module that normalises over labelled channels.

    Attributes:
        kind: ``"layer"``, ``"rms"`` or ``"group"`` (of one group).
        axis: The channel axis of its input.
        channels: How many there are.
        eps: Added to the variance; ``None`` for the smallest that the input's dtype resolves.
    """

    kind: str
    axis: int
    channels: int
    eps: float | None


@dataclass(frozen=True)
class Trace:
    """Parts of the graph that slimming needs besides the coupling. They are not stored; the model is traced again.

    Attributes:
        nodes: Every call, in order of execution.
        norms: By path, modules that normalise over labelled channels.
        pads: For modules that only slice and pad along channels, their graph.
        counted: Modules that take a mean over labelled channels, which must count the absent ones.
        scopes: Paths of the submodules that were exported; ``("",)`` where the whole model was.
        stays: By axis, what of the parameters and buffers in the graph must stay, and why.
        computed: Of weights that are computed from a parameter element by element, the graph that does it.
    """

    nodes: tuple[Node, ...]
    norms: Mapping[str, Norm]
    pads: Mapping[str, fx.Graph]
    counted: frozenset[str] = frozenset()
    scopes: tuple[str, ...] = ("",)
    stays: tuple[Stay, ...] = ()
    computed: Mapping[str, fx.Graph] = field(default_factory=dict)


@dataclass(frozen=True)
class Coupling:
    """A model's weights, channel units and groups.

    Attributes:
        weights: In the order of execution, each parameter once.
        producers: Every weight axis that makes channels.
        groups: The channel groups, in order of their units.
        fields: For each parameter or buffer that units touch, its unit fields: integer tensors
            broadcastable to its shape, ``STAYS`` where an element belongs to no unit. An element
            goes when a unit of any of its fields goes.
        kept: The parts that are not pruned, and why.
        contractions: For counting.
        shapes: Shape of every parameter of the model.
        unknown_ops: Names of ops that had no rule, each with the number of its uses.
        branches: The residual branches, in order of execution.
        scales: By name, parameters that are divided by a norm of their own before use.
        trace: Further parts of the graph for slimming; ``None`` in a coupling read from a file.
        experts: The sets of experts of which some can go, in order of execution.
    """

    weights: tuple[Weight, ...]
    producers: tuple[Producer, ...]
    groups: tuple[Group, ...]
    fields: Mapping[str, tuple[Int64[Tensor, "..."], ...]]
    kept: tuple[Kept, ...]
    contractions: tuple[Contraction, ...]
    shapes: Mapping[str, tuple[int, ...]]
    unknown_ops: Mapping[str, int] = field(default_factory=dict)
    branches: tuple[Branch, ...] = ()
    scales: Mapping[str, Scale] = field(default_factory=dict)
    trace: Trace | None = field(default=None, compare=False, repr=False)
    experts: tuple[ExpertSet, ...] = ()

    @property
    def n_units(self) -> int:
        """Number of channel units."""
        return self.groups[-1].stop if self.groups else 0

    def masks(self, removed: Bool[Tensor, " units"]) -> dict[str, Bool[Tensor, "..."]]:
        """Masks that set the removed units to zero.

        Args:
            removed: For each unit whether it goes.

        Returns:
            For each masked parameter or buffer a mask, True where an element stays, broadcastable
            to the tensor's shape. Tensors that lose nothing are left out.
        """
        return self.spared(self.left(removed))

    def left(self, removed: Bool[Tensor, " units"]) -> dict[str, Bool[Tensor, "..."]]:
        """The positions that remain of every tensor after the removed units are sliced away.

        The same as :meth:`masks` but for parameters that are divided by a norm of their own.
        """
        out: dict[str, Tensor] = {}
        is_removed = _with_stays(removed)
        for name, fields in self.fields.items():
            keep: Tensor | None = None
            for units in fields:
                k = ~is_removed[units]
                keep = k if keep is None else keep & k
            if keep is not None and not bool(keep.all()):
                out[name] = keep
        return out

    def spared(self, masks: Mapping[str, Bool[Tensor, "..."]]) -> dict[str, Bool[Tensor, "..."]]:
        """The same masks, but scales are masked in place of what has a norm of its own (see :class:`Scale`)."""
        out = dict(masks)
        for name, scale in self.scales.items():
            keep = out.get(name)
            if keep is None or not scale.name:
                continue
            others = [d for d in range(keep.ndim) if d != scale.axis]
            any_remaining = keep.sum(others, keepdim=True) > 0 if others else keep
            if bool(any_remaining.all()):
                continue
            out[name] = keep | ~any_remaining
            if bool(out[name].all()):
                del out[name]
            own = len(self.shapes[scale.name])
            any_remaining = any_remaining if own == keep.ndim else any_remaining.flatten()
            any_remaining = any_remaining.reshape(()) if own == 0 else any_remaining
            out[scale.name] = out[scale.name] & any_remaining if scale.name in out else any_remaining
        return out

    def left_by_experts(self, gone: Mapping[str, Bool[Tensor, " experts"]]) -> dict[str, Bool[Tensor, "..."]]:
        """The positions that remain of tensors after experts are sliced away, broadcastable to their shapes.

        Args:
            gone: By the name of a set, for each of its experts whether it goes.
        """
        return {
            name: ~gone[s.name].cpu().view(-1, *[1] * (len(self.shapes[name]) - 1))
            for s in self.experts
            if s.name in gone and bool(gone[s.name].any())
            for name in s.tensors
        }

    def params(self, removed: Bool[Tensor, " units"] | None = None) -> int:
        """Number of parameters, or of those left when units go."""
        total = sum(prod(s) for s in self.shapes.values())
        if removed is None:
            return total
        is_removed = _with_stays(removed)
        for name, fields in self.fields.items():
            if name in self.shapes:
                remaining, size = _count_remaining(fields, is_removed)
                total -= (size - remaining) * (prod(self.shapes[name]) // size)
        return total

    def flops(self, removed: Bool[Tensor, " units"] | None = None) -> int:
        """FLOPs (2 x multiply-adds) of one forward pass on the example inputs.

        Args:
            removed: Units that are gone; ``None`` for the dense network.
        """
        if removed is None:
            return 2 * sum(c.macs for c in self.contractions)
        is_removed = _with_stays(removed)
        total = 0
        for c in self.contractions:
            remaining, size = c.macs, 1
            for fields in (*((units,) for units in c.factors), self.fields.get(c.weight or "", ())):
                part, of = _count_remaining(fields, is_removed)
                remaining, size = remaining * part, size * of
            total += remaining // size
        return 2 * total


def _with_stays(removed: Bool[Tensor, " units"]) -> Bool[Tensor, " units_and_one"]:
    """For each unit whether it goes; one more entry, which ``STAYS`` indexes, does not."""
    return torch.cat([removed.cpu(), torch.zeros(1, dtype=torch.bool)])


def _count_remaining(
    fields: tuple[Int64[Tensor, "..."], ...], removed: Bool[Tensor, " units_and_one"]
) -> tuple[int, int]:
    """How many positions are left of how many, over the dimensions in which the fields vary.

    Rows and columns are counted one by one: a mask of a large weight would take as many bytes as it has elements.
    """
    masks = [~removed[units] for units in fields]
    seen_dims: set[int] = set()
    remaining = size = 1
    for k in masks:
        dims = {d for d, n in enumerate(k.shape) if n > 1}
        if dims & seen_dims:  # fields that share a dimension are no rectangle
            both = masks[0]
            for other in masks[1:]:
                both = both & other
            return int(both.sum()), both.numel()
        seen_dims |= dims
        remaining, size = remaining * int(k.sum()), size * k.numel()
    return remaining, size
