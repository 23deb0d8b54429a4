"""From a model to its coupling: run the rules over the graph, then turn label classes into units and groups."""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor, fx, nn

from .branches import residuals
from .coupling import STAYS, Branch, Contraction, Coupling, Group, Kept, Node, Producer, Touch, Trace, Weight
from .export import Exported, export, module_of, shape_of, within
from .labels import MUST_STAY, Field
from .mend import READS_SIZES
from .reasons import because, stays
from .rules import RULES, Context
from .rules.mutation import mutated

__all__ = ["Pass"]

log = logging.getLogger(__name__)


class Pass:
    """One pass of the rules over a model, from which couplings are made; what is pinned in between stays.

    Args:
        model: Any module; it is run in eval mode, without gradients, and left as it was.
        args: Example positional inputs.
        kwargs: Example keyword inputs.
        exclude: For a module's path, whether its output channels must all stay (its input columns may go).
        exported: The model's graph, where it has been exported already.
    """

    def __init__(
        self,
        model: nn.Module,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        exclude: Callable[[str], bool] | None = None,
        exported: Exported | None = None,
    ) -> None:
        self._ctx = propagate(exported or export(model, args, kwargs))
        if exclude is not None:
            made = [(use.module, use.name, use.out_axis) for use in self._ctx.uses.values()]
            made += [(table.rpartition(".")[0], table, 1) for table in sorted(self._ctx.tables)]
            for module, name, axis in made:
                field = self._ctx.axis_field(self._ctx.axis_fields(name), axis)
                if exclude(module) and field is not None:
                    self._ctx.labels.stay(field.labels, "excluded by the user")
        self._pinned: dict[str, int] = {}

    def coupling(self) -> Coupling:
        """The coupling, as things stand."""
        _rectangles(self._ctx)
        return _assemble(self._ctx)

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
            if node.op == "call_function":
                result = self._ctx.env.get(node, ())
                held = tuple(f for f in result if isinstance(f, Field)) if shape_of(node) is not None else ()
                out.setdefault(module_of(node), []).append((op_name(node), shape_of(node), held))
        return out

    def pin(self, module: str | None, reason: str) -> None:
        """Keeps whole what a module deals with: first what its own code gives sizes to, then all that it is given."""
        if module is None:
            return
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
        """Keeps a group whole."""
        g = coupling.groups[group]
        for p in coupling.producers:
            field = self._ctx.axis_field(self._ctx.axis_fields(p.weight), p.axis)
            if field is not None:
                self._ctx.labels.stay(field.labels.flatten()[(p.units >= g.start) & (p.units < g.stop)], reason)

    def pin_everything(self, reason: str) -> None:
        """Keeps every channel."""
        for m in _makers(self._ctx):
            self._ctx.labels.stay(m.labels, reason)


def propagate(exported: Exported) -> Context:
    """Runs every node's rule, in order of execution."""
    ctx = Context(exported, dead=_dead(exported.graph))
    for name in sorted(exported.shared):
        ctx.labels.stay_all(ctx.axis_fields(name), "shared with code that could not be exported")
    for node in exported.graph.nodes:
        ctx.labels.at = node.name
        if node.op == "call_function":
            ctx.labels.because = because(op_name(node), module_of(node))
            _apply(ctx, node)
        elif node.op == "output":
            whole = exported.scopes == ("",)
            ctx.labels.because = "an output of the model" if whole else "an output of a part that was exported alone"
            for source in node.all_input_nodes:
                ctx.labels.stay_all(_flat(ctx, source))
    ctx.labels.at = ""
    return ctx


def _dead(graph: fx.Graph) -> frozenset[fx.Node]:
    """Calls whose results nothing reads, and that write nothing: attention weights that are not asked for, say."""
    dead: set[fx.Node] = set()
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


def op_name(node: fx.Node) -> str:
    """An op's base name, without the mark of in-place ops."""
    if node.target is operator.getitem:
        return "getitem"
    name = getattr(node.target, "_opname", getattr(node.target, "__name__", str(node.target)))
    return name if name.startswith("__") else name.rstrip("_")


def _apply(ctx: Context, node: fx.Node) -> None:
    name = op_name(node)
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
    if name != "getitem" and str(getattr(node.target, "_opname", "")).endswith("_") and not name.startswith("_"):
        mutated(ctx, node)


def _flat(ctx: Context, node: fx.Node) -> list[Field]:
    held = ctx.env.get(node)
    if held is None:
        return list(ctx.fields(node))
    return [f for x in held for f in ([x] if isinstance(x, Field) else x)]


def _rectangles(ctx: Context) -> None:
    """Where channels are seen as rows and columns, whole rows or whole columns go: whichever are more."""
    ctx.labels.because = "channels seen as rows and columns that are tied in both directions"
    changed = bool(ctx.rectangles)
    while changed:
        changed = False
        root, _ = ctx.labels.classes()
        for labels in ctx.rectangles:
            now = root[labels]
            varying = [d for d in range(now.dim()) if now.shape[d] > 1 and not bool((now == now.narrow(d, 0, 1)).all())]
            if len(varying) < 2:
                continue
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


@dataclass(frozen=True)
class _Made:
    """A weight's axis that makes channels, with its labels."""

    name: str
    axis: int
    labels: Int64[Tensor, " n"]


@dataclass(frozen=True)
class _Run:
    """A run of units that the same weights make."""

    start: int
    stop: int
    makers: frozenset[str]


@dataclass(frozen=True)
class _Units:
    """Units found: the unit of every label, and their runs."""

    of_label: Int64[Tensor, " labels"]
    runs: tuple[_Run, ...]


def _number(root: Int64[Tensor, " labels"], made: Sequence[_Made], parts: Sequence[Int64[Tensor, "..."]]) -> _Units:
    """Numbers the classes that weights make, run by run: those of the same makers are neighbours.

    Args:
        root: Root of every label.
        made: Every axis that makes channels, in order of execution.
        parts: Labels that code cuts out of a tensor: classes in different parts are of different runs, so that
            something is left of each.
    """
    n, never = root.numel(), np.iinfo(np.int64).max
    rng = np.random.default_rng(0)
    makers_key = np.zeros(n, dtype=np.uint64)  # a class's set of makers, as the XOR of a random number for each
    order = np.full(n, never, dtype=np.int64)  # where a class was first made
    position = 0
    for m in made:
        roots = root[m.labels].numpy()
        unique, first = np.unique(roots, return_index=True)
        makers_key[unique] ^= rng.integers(1, 2**63, dtype=np.uint64)
        order[unique] = np.minimum(order[unique], position + first)
        position += roots.size
    for labels in parts:
        makers_key[np.unique(root[labels].numpy())] ^= rng.integers(1, 2**63, dtype=np.uint64)
    live = np.flatnonzero(order < never)
    live = live[live != MUST_STAY]
    key = makers_key[live]
    kinds, kind = np.unique(key, return_inverse=True)
    kind_first = np.full(kinds.size, never, dtype=np.int64)
    np.minimum.at(kind_first, kind, order[live])
    ranked = np.lexsort((order[live], kind_first[kind]))
    of_root = np.full(n, STAYS, dtype=np.int64)
    of_root[live[ranked]] = np.arange(live.size)
    of_label = torch.from_numpy(of_root)[root]

    sorted_kind = kind[ranked]
    starts = (
        np.flatnonzero(np.r_[True, sorted_kind[1:] != sorted_kind[:-1]]) if live.size else np.zeros(0, dtype=np.int64)
    )
    stops = np.r_[starts[1:], live.size] if live.size else starts
    makers: list[set[str]] = [set() for _ in starts]
    for m in made:
        units = of_label[m.labels]
        for run in np.unique(np.searchsorted(starts, units[units != STAYS].numpy(), side="right") - 1):
            makers[int(run)].add(m.name)
    runs = (_Run(int(a), int(b), frozenset(w)) for a, b, w in zip(starts, stops, makers, strict=True))
    return _Units(of_label, tuple(runs))


def _makers(ctx: Context) -> list[_Made]:
    """Every axis of a weight or an embedding that makes channels."""
    axes = [(use.name, use.out_axis) for use in ctx.uses.values()]
    axes += [(name, 1) for name in sorted(ctx.tables)]
    axes += [axis for axis in ctx.makers if axis not in set(axes)]
    fields = [(name, axis, ctx.axis_field(ctx.axis_fields(name), axis)) for name, axis in axes]
    return [_Made(name, axis, f.labels.flatten()) for name, axis, f in fields if f is not None]


def _assemble(ctx: Context) -> Coupling:
    made = _makers(ctx)
    root, why = ctx.labels.classes()
    units = _number(root, made, ctx.parts)
    alone = [r.start for r in units.runs if r.stop - r.start < 2]
    if alone:  # one of each group must stay, so a group of one has nothing to spare
        labels = [int((units.of_label == a).nonzero()[0]) for a in alone]
        ctx.labels.stay(torch.tensor(labels), "the only unit of its group")
        root, why = ctx.labels.classes()
        units = _number(root, made, ctx.parts)

    fields: dict[str, tuple[Tensor, ...]] = {}
    for name, axis_fields in ctx.named_axes.items():
        held = tuple(u for f in axis_fields if bool(((u := units.of_label[f.labels]) != STAYS).any()))
        if held:
            fields[name] = held
    producers = tuple(
        Producer(m.name, m.axis, u) for m in made if bool(((u := units.of_label[m.labels]) != STAYS).any())
    )
    return Coupling(
        weights=_weights(ctx),
        producers=producers,
        groups=_groups(ctx, units, fields, producers),
        fields=fields,
        kept=_kept(ctx, made, units, why),
        contractions=_contractions(ctx, units),
        shapes={n: s for n, s in ctx.exported.shapes.items() if n in ctx.exported.trainable},
        unknown_ops=dict(ctx.unknown),
        branches=_branches(ctx),
        trace=_trace(ctx, units, made, root),
    )


def _branches(ctx: Context) -> tuple[Branch, ...]:
    found = residuals(ctx)
    names = _names([frozenset(r.weights) for r in found])
    return tuple(Branch(name, r.tensors, r.weights, r.modules) for name, r in zip(names, found, strict=True))


def _weights(ctx: Context) -> tuple[Weight, ...]:
    macs: dict[str, int] = {}
    for p in ctx.products:
        if p.weight is not None:
            macs[p.weight] = macs.get(p.weight, 0) + p.macs
    first = next((u.name for u in ctx.uses.values() if u.op == "conv"), None)
    last = _classifiers(ctx)
    out = []
    for use in ctx.uses.values():
        role = "first convolution" if use.name == first else "classifier" if use.name in last else ""
        shape = ctx.exported.shapes[use.name]
        out.append(
            Weight(use.name, use.module, use.op, shape, use.out_axis, use.in_axis, use.groups, macs[use.name], role)
        )
    return tuple(out)


_MOVES = {
    "reshape",
    "view",
    "flatten",
    "squeeze",
    "unsqueeze",
    "alias",
    "dropout",
    "contiguous",
    "clone",
    "to",
    "_to_copy",
}
"""Ops that hand a value on as it is."""


def _classifiers(ctx: Context) -> set[str]:
    """Weights whose product reaches an output of the model through nothing but movement, sums and constant factors.

    Several heads whose average is the output (a distilled DeiT's, say) are all classifiers. A sum counts only if all of
    its terms are products that nothing else reads: a residual stream is more than what its last layer adds to it.
    """
    products = {p.node: p.weight for p in ctx.products if p.weight is not None}

    def behind(node: fx.Node, summed: bool) -> set[str] | None:
        """The weights of the products that make up a value; ``None`` where there is something else in it."""
        while node.op == "call_function" and not (summed and len(node.users) > 1):
            if node in products:
                return {products[node]}
            name, sources = op_name(node), node.all_input_nodes
            if name in {"add", "sub"} and len(sources) > 1:
                terms = [behind(source, True) for source in sources]
                return None if None in terms else set().union(*(t for t in terms if t is not None))
            if name not in _MOVES and not (name in {"add", "sub", "mul", "div"} and len(sources) == 1):
                return None
            node = sources[0]
        return None

    output = next(n for n in ctx.exported.graph.nodes if n.op == "output")
    return {name for node in output.all_input_nodes for name in behind(node, False) or ()}


def _groups(
    ctx: Context, units: _Units, fields: Mapping[str, tuple[Tensor, ...]], producers: Sequence[Producer]
) -> tuple[Group, ...]:
    rows = {(p.weight, p.axis) for p in producers}
    touches: list[list[Touch]] = [[] for _ in units.runs]
    channels = [1] * len(units.runs)
    starts = torch.tensor([r.start for r in units.runs])
    for name, held in fields.items():
        columns = ctx.uses[name].in_axis if name in ctx.uses else None
        for u in held:
            axes = tuple(d for d, n in enumerate(u.shape) if n > 1)
            kind = "rows" if (name, axes[0]) in rows else "columns" if columns == axes[0] else "entries"
            owners = torch.searchsorted(starts, u[u != STAYS], right=True) - 1
            for g, count in zip(*(t.tolist() for t in torch.unique(owners, return_counts=True)), strict=True):
                touches[g].append(Touch(name, axes, kind))
                if kind == "rows":
                    run = units.runs[g]
                    channels[g] = max(channels[g], count // (run.stop - run.start))
    order = {name: i for i, name in enumerate([*ctx.uses, *sorted(ctx.tables)])}
    names = _names([r.makers for r in units.runs])
    return tuple(
        Group(names[g], r.start, r.stop, tuple(sorted(r.makers, key=order.__getitem__)), tuple(touches[g]), channels[g])
        for g, r in enumerate(units.runs)
    )


def _names(makers: Sequence[frozenset[str]]) -> list[str]:
    """Short unique names: the producers' common path, numbered where several groups share it."""
    out: list[str] = []
    seen: dict[str, int] = {}
    for weights in makers:
        paths = sorted(w.rpartition(".")[0] or w for w in weights)
        common = paths[0].split(".")
        for p in paths[1:]:
            parts = p.split(".")
            n = next(
                (i for i, (x, y) in enumerate(zip(common, parts, strict=False)) if x != y), min(len(common), len(parts))
            )
            common = common[:n]
        name = ".".join(common) or "stream"
        seen[name] = seen.get(name, 0) + 1
        out.append(name if seen[name] == 1 else f"{name}#{seen[name]}")
    return out


def _kept(ctx: Context, made: Sequence[_Made], units: _Units, why: Mapping[int, str]) -> tuple[Kept, ...]:
    out = []
    for m in made:
        staying = m.labels[units.of_label[m.labels] == STAYS]
        if staying.numel():
            reason = next((why[i] for i in staying.tolist() if i in why), "no reason recorded")
            share = "" if staying.numel() == m.labels.numel() else f"{staying.numel()} of {m.labels.numel()} channels: "
            out.append(Kept(m.name, share + reason))
    out += [
        Kept(op, f"an op without a rule, used {n} times; what touches it is kept whole")
        for op, n in ctx.unknown.items()
    ]
    out += [
        Kept(path or "the model", f"its own code could not be exported, its parts were followed alone ({reason})")
        for path, reason in ctx.exported.failures.items()
    ]
    return tuple(out)


def _contractions(ctx: Context, units: _Units) -> tuple[Contraction, ...]:
    out = []
    for p in ctx.products:
        factors = tuple(u for f in p.factors if bool(((u := units.of_label[f]) != STAYS).any()))
        out.append(Contraction(p.module, p.weight, p.macs, factors))
    return tuple(out)


def _trace(ctx: Context, units: _Units, made: Sequence[_Made], root: Int64[Tensor, " labels"]) -> Trace:
    nodes = []
    for node in ctx.exported.graph.nodes:
        if node.op != "call_function":
            continue
        result = ctx.env.get(node, ())
        shape = shape_of(node)
        held: tuple[Tensor, ...] = ()
        if shape is not None and all(isinstance(f, Field) for f in result):
            held = tuple(u for f in result if bool(((u := units.of_label[f.labels]) != STAYS).any()))  # type: ignore[union-attr]
        inputs = tuple(a.name for a in node.all_input_nodes if a.op == "call_function")
        nodes.append(Node(node.name, op_name(node), module_of(node), shape, held, inputs, within(node)))
    pads = {m: _padding(ctx, m) for m in ctx.pads}
    why = stays(ctx, [(m.name, m.labels) for m in made], root, units.of_label, {n.name: n.op for n in nodes})
    return Trace(tuple(nodes), dict(ctx.norms), pads, frozenset(ctx.counted), ctx.exported.scopes, stays=why)


def _padding(ctx: Context, module: str) -> fx.Graph:
    """The graph of a module that only slices and pads, to stand for it with other amounts."""
    inner = ctx.nodes_of(module)
    graph = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    source = next(a for n in inner for a in n.all_input_nodes if a not in set(inner))
    values[source] = graph.placeholder("x")
    for node in inner:
        values[node] = graph.node_copy(node, lambda n: values[n])
        values[node].meta = {"name": node.name}
    graph.output(values[inner[-1]])
    return graph
