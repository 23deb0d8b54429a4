"""The registry of op rules, and the context that a rule reads.

A rule is a function ``(ctx, node) -> Result`` registered under an ATen op's name: it reads the fields of the node's
operands, joins the labels of channels that must go together, and returns the fields of the result. Channels that meet
an op without a rule are not pruned, and the report names the op.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from jaxtyping import Int64
from torch import Tensor, fx

from ..coupling import Norm, Scale
from ..export import Exported, module_of, shape_of, within
from ..labels import Field, Fields, Labels

Result = Fields | tuple[Fields, ...]
Rule = Callable[["Context", fx.Node], Result]

Axes = tuple[int | None, ...]
"""For each dimension of a value the axis of the parameter that it is; ``None`` where it is no axis alone."""

RULES: dict[str, Rule] = {}

MOVEMENT: set[str] = set()
"""Ops that move values and compute none: every element of the result is an element of an operand, or constant."""


def rule(*names: str, moves: bool = False) -> Callable[[Rule], Rule]:
    """Registers a rule for ATen ops, by base name (``"add"`` also covers ``add_``).

    Args:
        names: Base names of the ops; a later registration replaces an earlier one.
        moves: Whether the ops belong to :data:`MOVEMENT`.
    """

    def register(fn: Rule) -> Rule:
        for name in names:
            RULES[name] = fn
            (MOVEMENT.add if moves else MOVEMENT.discard)(name)
        return fn

    return register


@dataclass(frozen=True)
class Product:
    """A contraction seen in the graph, before labels are turned into units."""

    node: fx.Node
    module: str
    weight: str | None
    macs: int
    factors: tuple[Int64[Tensor, "..."], ...]


@dataclass(frozen=True)
class WeightUse:
    """A parameter contracted with activations."""

    name: str
    module: str
    op: str
    out_axis: int
    in_axis: int
    groups: int


@dataclass
class Context:
    """The state of one pass over the graph.

    Attributes:
        exported: The graph.
        labels: Makes and joins labels.
        env: Fields of every node done so far; a tuple of them for nodes with several results.
        rectangles: Label arrays that must lose whole rows or whole columns only.
        products: Every contraction, for counting.
        uses: Parameters contracted with activations, by name.
        norms: Modules that normalise over labelled channels.
        counted: Modules that take a mean over labelled channels, which must count the absent ones.
        pads: Modules whose padding along channels can be rewritten.
        dead: Calls whose results nothing reads.
        parts: Labels of the parts that code cuts out of a tensor, none of which may lose everything.
        makers: Further axes of weights that make channels, by name and axis.
        tables: Embeddings, whose columns are channels.
        unknown: Ops without a rule, with the number of their uses.
        unmaskable: By name, why elements of a weight cannot be masked.
        operands: Nodes of weights that are computed from a parameter, by the parameter's name.
        scales: Factors that follow the division of a weight by its own norm, by the weight's name.
        zero_sources: Per node, the parameters whose zeros are its zeros (see :mod:`.weights`).
        training: Whether the call that is being read is one of training mode alone.
        training_uses: Parameters contracted with activations in training mode alone, by name.
    """

    exported: Exported
    labels: Labels = field(default_factory=Labels)
    env: dict[fx.Node, Result] = field(default_factory=dict)
    rectangles: list[Int64[Tensor, "..."]] = field(default_factory=list)
    products: list[Product] = field(default_factory=list)
    uses: dict[str, WeightUse] = field(default_factory=dict)
    norms: dict[str, Norm] = field(default_factory=dict)
    counted: set[str] = field(default_factory=set)
    pads: set[str] = field(default_factory=set)
    dead: frozenset[fx.Node] = frozenset()
    parts: list[Int64[Tensor, "..."]] = field(default_factory=list)
    makers: dict[tuple[str, int], None] = field(default_factory=dict)
    tables: set[str] = field(default_factory=set)
    unknown: dict[str, int] = field(default_factory=dict)
    unmaskable: dict[str, str] = field(default_factory=dict)
    operands: dict[str, fx.Node] = field(default_factory=dict)
    scales: dict[str, Scale] = field(default_factory=dict)
    zero_sources: dict[fx.Node, Mapping[str, Axes]] = field(default_factory=dict)
    training: bool = False
    training_uses: dict[str, WeightUse] = field(default_factory=dict)
    _axes: dict[str, Fields] = field(default_factory=dict)
    _depends: dict[fx.Node, bool] = field(default_factory=dict)

    def fields(self, value: Any) -> Fields:
        """The fields of an operand; none for constants and user inputs."""
        if not isinstance(value, fx.Node):
            return ()
        name = self.tensor_name(value)
        if name is not None and value not in self.env:
            return self.axis_fields(name)
        got = self.env.get(value, ())
        if got and not isinstance(got[0], Field):
            raise TypeError(f"{value.name} has several results")
        return got  # type: ignore[return-value]

    def shape(self, value: Any) -> tuple[int, ...]:
        """An operand's shape; ``()`` for numbers."""
        return shape_of(value) or ()

    def tensor_name(self, value: Any) -> str | None:
        """The parameter or buffer that a node stands for, if it does."""
        if isinstance(value, fx.Node) and value.op == "placeholder":
            return self.exported.tensors.get(value.name)
        return None

    def readers(self, name: str) -> list[fx.Node]:
        """The calls that read a parameter or buffer and whose results are read."""
        places = (n for n in self.exported.graph.nodes if self.tensor_name(n) == name)
        return [u for n in places for u in n.users if u not in self.dead]

    def axis_fields(self, name: str) -> Fields:
        """One field per axis of a parameter or buffer, the same at every use (one axis, one set of labels)."""
        if name not in self._axes:
            shape = self.exported.shapes[name]
            made = []
            for axis, n in enumerate(shape):
                if n > 1:
                    view = [1] * len(shape)
                    view[axis] = n
                    made.append(Field(self.labels.fresh(n).view(view), zero=True))
            self._axes[name] = tuple(made)
        return self._axes[name]

    def axis_field(self, fields: Fields, axis: int) -> Field | None:
        """The field that varies along one axis and nothing else."""
        return next((f for f in fields if f.dims == {axis}), None)

    def collapse(self, fields: Iterable[Field], dims: Collection[int]) -> Fields:
        """The fields with their labels joined along dimensions; without those that varied along nothing else."""
        out = []
        for f in fields:
            along = f.dims.intersection(dims)
            remaining = self.labels.collapse(f, along) if along else f
            if remaining is not None:
                out.append(remaining)
        return tuple(out)

    def depends_on_inputs(self, node: fx.Node) -> bool:
        """Whether a value depends on the user's inputs, other than by being chosen by index."""
        known = self._depends.get(node)
        if known is None:
            if node.op == "placeholder":
                known = node.name not in self.exported.tensors
            else:
                sources = node.all_input_nodes
                # An expert chosen by a router is still a weight: which one depends on the input, its values do not.
                if getattr(node.target, "_opname", "") in ("index", "index_select", "gather"):
                    sources = sources[:1]
                known = any(self.depends_on_inputs(s) for s in sources)
            self._depends[node] = known
        return known

    @property
    def named_axes(self) -> Mapping[str, Fields]:
        """Fields of every parameter and buffer used so far."""
        return self._axes

    def nodes_of(self, module: str) -> list[fx.Node]:
        """Nodes whose innermost module is this one, in the mode that is being read; else in the other."""
        return self._calls.get((module, self.training)) or self._calls.get((module, not self.training), [])

    def in_trace(self, node: fx.Node) -> bool:
        """Whether a call is of eval mode, or of a module that runs in training mode alone."""
        return not node.meta.get("training") or (module_of(node), False) not in self._calls

    @cached_property
    def _calls(self) -> Mapping[tuple[str, bool], list[fx.Node]]:
        out: dict[tuple[str, bool], list[fx.Node]] = {}
        for node in self.exported.graph.nodes:
            if node.op == "call_function":
                out.setdefault((module_of(node), bool(node.meta.get("training"))), []).append(node)
        return out

    def runs_children(self, module: str) -> bool:
        """Whether a module calls modules of its own that run anything."""
        return module in self._parents

    @cached_property
    def _parents(self) -> frozenset[str]:
        nodes = (node for node in self.exported.graph.nodes if node.op == "call_function")
        return frozenset(path for node in nodes for path in within(node)[:-1])


def argument(node: fx.Node, name: str, default: Any = None) -> Any:
    """An op's argument by its schema name, whether it was given by position or by name."""
    if name in node.kwargs:
        return node.kwargs[name]
    # Private, as _opname and _overloadname elsewhere in the rules: an OpOverload has no public ones (torch 2.14).
    schema = node.target._schema  # type: ignore[union-attr]
    for i, arg in enumerate(schema.arguments):
        if arg.name == name:
            if i < len(node.args):
                return node.args[i]
            return arg.default_value if arg.has_default_value() and default is None else default
    return default
