"""Where op rules are found, and what a rule sees.

A rule is a function ``(ctx, node) -> Result`` registered under an ATen op's name: it reads the fields of the node's
operands, joins what must go together, and returns the fields of the result. An op without a rule keeps everything
that touches it whole and is named in the report.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor, fx

from ..carried import Axes, carried, reason_lost
from ..coupling import Norm, Scale
from ..export import Exported, module_of, shape_of, within
from ..labels import Field, Fields, Labels

Result = Fields | tuple[Fields, ...]
Rule = Callable[["Context", fx.Node], Result]

RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Registers a rule for ATen ops, by base name (``"add"`` also covers ``add_``)."""

    def register(fn: Rule) -> Rule:
        for name in names:
            RULES[name] = fn
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
        unmaskable: Of weights whose elements cannot be masked, why not.
        operands: Of weights that are computed from a parameter, what is multiplied.
        scales: Of weights that are divided by a norm of their own, what scales them afterwards.
        carried: Per node, the parameters whose zeros are its zeros.
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
    carried: dict[fx.Node, Mapping[str, Axes]] = field(default_factory=dict)
    training: bool = False
    training_uses: dict[str, WeightUse] = field(default_factory=dict)
    _axes: dict[str, Fields] = field(default_factory=dict)
    _depends: dict[fx.Node, bool] = field(default_factory=dict)
    _by_module: dict[tuple[str, bool], list[fx.Node]] | None = None
    _parents: set[str] | None = None

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

    def weight_of(self, value: Any, out_dim: int, in_dim: int) -> tuple[str, int, int] | None:
        """The parameter that a contraction's operand is, or is made from, with its output and input axes.

        Args:
            value: The operand: a parameter, or what was computed from parameters alone (standardised, transposed, a
                part, an expert chosen by index).
            out_dim: The operand's dimension that makes channels.
            in_dim: The operand's dimension that is summed over.
        """
        if not isinstance(value, fx.Node) or self.depends_on_inputs(value):
            return None
        name = self.tensor_name(value)
        if name is not None:
            return (name, out_dim, in_dim) if name in self.exported.trainable else None
        whole = carried(self, value)
        found = self._carried_weight(whole, out_dim, in_dim) or self._made_weight(value, out_dim, in_dim)
        if found is not None:
            if found[0] in whole:
                self.operands.setdefault(found[0], value)
            else:
                self.unmaskable.setdefault(found[0], reason_lost(self, value, found[0]))
        return found

    def _carried_weight(self, whole: Mapping[str, Axes], out_dim: int, in_dim: int) -> tuple[str, int, int] | None:
        """The largest parameter whose zeros are those of an operand."""
        for name in sorted(whole, key=lambda n: -prod(self.exported.shapes[n])):
            out_axis, in_axis = whole[name][out_dim], whole[name][in_dim]
            if out_axis is not None and in_axis is not None and out_axis != in_axis:
                return name, out_axis, in_axis
        return None

    def _made_weight(self, value: fx.Node, out_dim: int, in_dim: int) -> tuple[str, int, int] | None:
        """The largest parameter that an operand is made from, by labels that it has of its axes, else by its shape."""
        shapes = self.exported.shapes
        names = [n for n in self._made_from(value) if n in self.exported.trainable and len(shapes[n]) > 1]
        names = sorted(names, key=lambda n: (-prod(shapes[n]), n))
        for name in names:
            axes = [self._axis_like(name, value, d) for d in (out_dim, in_dim)]
            if axes[0] is not None and axes[1] is not None and axes[0] != axes[1]:
                return name, axes[0], axes[1]
        rank = len(self.shape(value))
        alike = (n for n in names if shapes[n] == self.shape(value))
        return next(((n, out_dim % rank, in_dim % rank) for n in alike), None)

    def _axis_like(self, name: str, value: fx.Node, dim: int) -> int | None:
        """The axis of a parameter whose labels an operand has along a dimension."""
        here = next((f for f in self.fields(value) if f.dims == {dim}), None)
        for axis in range(len(self.exported.shapes[name])) if here is not None else ():
            field = self.axis_field(self.axis_fields(name), axis)
            if field is not None and here is not None and bool(torch.isin(here.labels.flatten()[:1], field.labels)):
                return axis
        return None

    def depends_on_inputs(self, node: fx.Node) -> bool:
        """Whether a value depends on the user's inputs, other than by being chosen by index."""
        known = self._depends.get(node)
        if known is None:
            if node.op == "placeholder":
                known = node.name not in self.exported.tensors
            else:
                sources = node.all_input_nodes
                if getattr(node.target, "_opname", "") in ("index", "index_select", "gather"):
                    sources = sources[:1]
                known = any(self.depends_on_inputs(s) for s in sources)
            self._depends[node] = known
        return known

    def _made_from(self, node: fx.Node) -> set[str]:
        name = self.tensor_name(node)
        if name is not None:
            return {name}
        return {
            n for source in node.all_input_nodes if not self.depends_on_inputs(source) for n in self._made_from(source)
        }

    @property
    def named_axes(self) -> Mapping[str, Fields]:
        """Fields of every parameter and buffer used so far."""
        return self._axes

    def nodes_of(self, module: str) -> list[fx.Node]:
        """Nodes whose innermost module is this one, in the mode that is being read; else in the other."""
        return self._calls.get((module, self.training)) or self._calls.get((module, not self.training), [])

    def is_told(self, node: fx.Node) -> bool:
        """Whether a call is of eval mode, or of a module that runs in training mode alone."""
        return not node.meta.get("training") or (module_of(node), False) not in self._calls

    @property
    def _calls(self) -> Mapping[tuple[str, bool], list[fx.Node]]:
        if self._by_module is None:
            self._by_module = {}
            for node in self.exported.graph.nodes:
                if node.op == "call_function":
                    key = module_of(node), bool(node.meta.get("training"))
                    self._by_module.setdefault(key, []).append(node)
        return self._by_module

    def runs_children(self, module: str) -> bool:
        """Whether a module calls modules of its own that run anything."""
        if self._parents is None:
            nodes = (node for node in self.exported.graph.nodes if node.op == "call_function")
            self._parents = {path for node in nodes for path in within(node)[:-1]}
        return module in self._parents


def argument(node: fx.Node, name: str, default: Any = None) -> Any:
    """An op's argument by its schema name, whether it was given by position or by name."""
    if name in node.kwargs:
        return node.kwargs[name]
    schema = node.target._schema  # type: ignore[union-attr]
    for i, arg in enumerate(schema.arguments):
        if arg.name == name:
            if i < len(node.args):
                return node.args[i]
            return arg.default_value if arg.has_default_value() and default is None else default
    return default
