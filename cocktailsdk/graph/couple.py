"""Runs the rules over a model's graph, pins channels that must stay, and builds couplings from the labels."""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxtyping import Int64
from torch import Tensor, fx, nn

from .assemble import assemble, making_axes
from .coupling import EXCLUDED, Coupling
from .export import Exported, export, module_of, op_name, shape_of, within
from .labels import MUST_STAY, Field
from .module_fixes import READS_SIZES
from .reasons import because
from .rules import RULES, Context
from .rules.mutation import mutated
from .training_mode import Unreached, idle, pin_unreached, reads_training, training_only, with_training

__all__ = ["Pass"]

log = logging.getLogger(__name__)


class Pass:
    """One pass of the rules over a model. Couplings can be built repeatedly while channels are pinned in between.

    Args:
        model: Any module; it is run in eval mode, without gradients, and left as it was.
        args: Example positional inputs.
        kwargs: Example keyword inputs.
        exclude: For a module's path, whether its output channels must all stay (its input columns may go).
        exported: The model's graph, where it has been exported already.
        training: Follow training mode, too, whether or not there are parameters that eval mode does not read.

    Attributes:
        follows_training: Whether the graph covers training mode as well as eval mode.
    """

    def __init__(
        self,
        model: nn.Module,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        exclude: Callable[[str], bool] | None = None,
        exported: Exported | None = None,
        training: bool = False,
    ) -> None:
        exported = exported or export(model, args, kwargs)
        unread = idle(exported)
        self.follows_training = False
        unreached = Unreached({}, "")
        # Exporting a second time costs as much as the first. It is needed only if parameters are left that eval mode
        # does not read and the code asks for the mode.
        if training or (unread and reads_training(model)):
            both = with_training(model, exported, args, kwargs, unread)
            self.follows_training = isinstance(both, Exported)
            exported, unreached = (both, unreached) if isinstance(both, Exported) else (exported, both)
        self._ctx = propagate(exported)
        pin_unreached(self._ctx, unreached)
        if exclude is not None:
            made = [(use.module, use.name, use.out_axis) for use in self._ctx.uses.values()]
            made += [(table.rpartition(".")[0], table, 1) for table in sorted(self._ctx.tables)]
            for module, name, axis in made:
                field = self._ctx.axis_field(self._ctx.axis_fields(name), axis)
                if exclude(module) and field is not None:
                    self._ctx.labels.stay(field.labels, EXCLUDED)
        self._pinned: dict[str, int] = {}

    def coupling(self) -> Coupling:
        """The coupling with the labels joined and pinned so far."""
        _rectangles(self._ctx)
        return assemble(self._ctx)

    @property
    def n_labels(self) -> int:
        """How many labels there are, ``MUST_STAY`` included."""
        return self._ctx.labels.count

    def tensors(self) -> dict[str, dict[int, Int64[Tensor, " n"]]]:
        """For each parameter and buffer in the graph, by axis, the labels along it."""
        named = self._ctx.named_axes
        return {
            name: {d: f.labels.flatten() for f in fields for d in f.dims if len(f.dims) == 1}
            for name, fields in named.items()
        }

    def calls(self) -> dict[str, list[tuple[str, tuple[int, ...] | None, tuple[Field, ...]]]]:
        """By module, its calls in order of execution: op, shape and fields of the result."""
        out: dict[str, list[tuple[str, tuple[int, ...] | None, tuple[Field, ...]]]] = {}
        for node in self._ctx.exported.graph.nodes:
            if node.op == "call_function" and self._ctx.in_trace(node):
                result = self._ctx.env.get(node, ())
                fields = tuple(f for f in result if isinstance(f, Field)) if shape_of(node) is not None else ()
                out.setdefault(module_of(node), []).append((op_name(node), shape_of(node), fields))
        return out

    def pin(self, module: str | None, reason: str) -> None:
        """Pins channels of a module: first those it reshapes by size, then all that it computes and receives."""
        if module is None:
            return
        # What is pinned grows with each failure of the same module: calls that take sizes, all of its own calls and
        # their inputs, then those of its children.
        depth = self._pinned.get(module, 0)
        self._pinned[module] = depth + 1
        for node in self._ctx.exported.graph.nodes:
            if node.op != "call_function":
                continue
            path = module_of(node)
            inside = module in within(node)
            sized = op_name(node) in READS_SIZES and (op_name(node) != "mean" or path in self._ctx.counted)
            if (path == module and (sized or depth)) or (inside and depth > 1):
                for touched in (node, *(node.all_input_nodes if depth else ())):
                    self._ctx.labels.stay_all(_flat(self._ctx, touched), reason)
        if depth == 1:  # what it is given enters its children too
            for node in self._ctx.exported.graph.nodes:
                if module in within(node)[:-1]:
                    for source in node.all_input_nodes:
                        if source.op == "call_function" and module not in within(source):
                            self._ctx.labels.stay_all(_flat(self._ctx, source), reason)

    def pin_units(self, coupling: Coupling, group: int, reason: str) -> None:
        """Pins all units of a group."""
        g = coupling.groups[group]
        for p in coupling.producers:
            field = self._ctx.axis_field(self._ctx.axis_fields(p.weight), p.axis)
            if field is not None:
                self._ctx.labels.stay(field.labels.flatten()[(p.units >= g.start) & (p.units < g.stop)], reason)

    def pin_everything(self, reason: str) -> None:
        """Keeps every channel."""
        for m in making_axes(self._ctx):
            self._ctx.labels.stay(m.labels, reason)


def propagate(exported: Exported) -> Context:
    """Runs every node's rule, in order of execution."""
    ctx = Context(exported, dead=_dead(exported.graph))
    # Code outside the exported parts may read these tensors in any way.
    for name in sorted(exported.shared):
        ctx.labels.stay_all(ctx.axis_fields(name), "shared with code that could not be exported")
    for node in exported.graph.nodes:
        ctx.labels.at = node.name
        if node.op == "call_function":
            ctx.labels.because = because(op_name(node), module_of(node))
            ctx.training = training_only(node)
            if ctx.training:
                _apply_in_training(ctx, node)
            else:
                _apply(ctx, node)
        elif node.op == "output":
            whole_model = exported.scopes == ("",)
            reason = "an output of the model" if whole_model else "an output of a part that was exported alone"
            ends = node.meta.get("eval")
            for source in node.all_input_nodes:
                both = ends is None or source.name in ends
                ctx.labels.stay_all(_flat(ctx, source), reason if both else f"{reason} in training mode")
    ctx.labels.at, ctx.training = "", False
    return ctx


def _apply_in_training(ctx: Context, node: fx.Node) -> None:
    """Joins labels that a call of training mode reads. The call is not counted and makes no channels of its own."""
    products, known = len(ctx.products), (set(ctx.uses), set(ctx.makers), set(ctx.tables))
    _apply(ctx, node)
    # Costs are those of inference, and a unit that only training mode makes would vanish at deployment.
    del ctx.products[products:]
    for name in ctx.uses.keys() - known[0]:
        ctx.training_uses[name] = ctx.uses.pop(name)
    for axis in ctx.makers.keys() - known[1]:
        del ctx.makers[axis]
    ctx.tables &= known[2]


def _dead(graph: fx.Graph) -> frozenset[fx.Node]:
    """Calls whose results nothing reads, and that write nothing: attention weights that are not asked for, say."""
    dead: set[fx.Node] = set()
    # Backwards, so that the readers of a node are decided before it.
    for node in reversed(graph.nodes):
        schema = getattr(node.target, "_schema", None)
        writes = schema is None or schema.is_mutable or not schema.returns
        if (
            node.op == "call_function"
            and (not writes or node.target is operator.getitem)
            and dead.issuperset(node.users)
        ):
            dead.add(node)
    return frozenset(dead)


def _apply(ctx: Context, node: fx.Node) -> None:
    name = op_name(node)
    # Ops that take sizes run in the slim module's code, too, even if nothing reads their result: they must not fail
    # there.
    if node in ctx.dead and name not in READS_SIZES - {"mean"}:
        ctx.env[node] = ()
        return
    rule = RULES.get(name)
    if rule is None:
        touched = [f for source in node.all_input_nodes for f in _flat(ctx, source)]
        if touched:
            ctx.unknown[name] = ctx.unknown.get(name, 0) + 1
            ctx.labels.stay_all(touched, f"{name} in {module_of(node) or 'the model'} is an op without a rule")
        ctx.env[node] = ()
        return
    result = rule(ctx, node)
    ctx.env[node] = result
    # A trailing underscore marks ops in place; a leading one marks private ops such as `_to_copy`, which are not.
    if name != "getitem" and str(getattr(node.target, "_opname", "")).endswith("_") and not name.startswith("_"):
        mutated(ctx, node)


def _flat(ctx: Context, node: fx.Node) -> list[Field]:
    result = ctx.env.get(node)
    if result is None:
        return list(ctx.fields(node))
    return [f for x in result for f in ([x] if isinstance(x, Field) else x)]


def _rectangles(ctx: Context) -> None:
    """Where code views channels as rows and columns, only rows or only columns can go: whichever are more."""
    ctx.labels.because = "channels seen as rows and columns that are tied in both directions"
    changed = bool(ctx.rectangles)
    # One join may change the classes seen by another rectangle, so the classes are computed anew after each change.
    # Every join lowers the number of classes, so the loop ends.
    while changed:
        changed = False
        root, _ = ctx.labels.classes()
        for labels in ctx.rectangles:
            now = root[labels]
            varying = [d for d in range(now.dim()) if now.shape[d] > 1 and not bool((now == now.narrow(d, 0, 1)).all())]
            if len(varying) < 2:
                continue
            # The dimension with most removable classes survives (heads if there are more heads than channels of a
            # head); size and position only break ties.
            survivor = max(varying, key=lambda d: (_distinct(now, d), now.shape[d], d))
            for d in varying:
                if d != survivor:
                    ctx.labels.join(labels, labels.narrow(d, 0, 1))
            changed = True
            break


def _distinct(now: Int64[Tensor, "..."], dim: int) -> int:
    """How many removable classes would be left if everything were joined but this dimension."""
    stays = (now == MUST_STAY).movedim(dim, 0).flatten(1).any(1)
    return int((~stays).sum())
