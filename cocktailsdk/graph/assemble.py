"""Builds a coupling from joined labels: classes of labels become units, and units become groups."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import takewhile

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor, fx

from .branches import residuals
from .coupling import STAYS, Branch, Contraction, Coupling, Group, Kept, Node, Producer, Touch, Trace, Weight
from .experts import expert_sets
from .export import module_of, op_name, shape_of, within
from .labels import MUST_STAY, Field
from .reasons import stays
from .rules import Context
from .rules.op_sets import FAKE_QUANTIZATION
from .rules.weights import zero_sources
from .weight_graph import weight_graph

__all__ = ["Made", "assemble", "making_axes"]


@dataclass(frozen=True)
class Made:
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

    def fields(self, labels: Iterable[Int64[Tensor, "..."]]) -> tuple[Int64[Tensor, "..."], ...]:
        """Labels as unit fields; without those of which everything stays."""
        found = (self.of_label[each] for each in labels)
        return tuple(units for units in found if bool((units != STAYS).any()))


def _number(root: Int64[Tensor, " labels"], made: Sequence[Made], parts: Sequence[Int64[Tensor, "..."]]) -> _Units:
    """Numbers the classes that weights make, so that classes with the same makers are neighbours.

    Args:
        root: Root of every label.
        made: Every axis that makes channels, in order of execution.
        parts: Labels that code cuts out of a tensor: classes in different parts are of different runs, so that
            something is left of each.
    """
    n, never = root.numel(), np.iinfo(np.int64).max
    # A set of makers is compared as the XOR of one 63-bit random number for each maker: a hash of sets that vectorises
    # over all labels. A fixed seed keeps unit order, and with it bundle bytes, the same in every run; a collision would
    # only merge two runs, and is as likely as 2 ** -63 for a pair.
    rng = np.random.default_rng(0)
    makers_key = np.zeros(n, dtype=np.uint64)  # a class's set of makers, as the XOR of a random number for each
    order = np.full(n, never, dtype=np.int64)  # where a class was first made
    position = 0
    for m in made:
        roots = root[m.labels].numpy()
        unique, first = np.unique(roots, return_index=True)
        # `unique`, since a weight that makes a class at several positions must be XORed in once, not twice.
        makers_key[unique] ^= rng.integers(1, 2**63, dtype=np.uint64)
        order[unique] = np.minimum(order[unique], position + first)
        position += roots.size
    for labels in parts:
        makers_key[np.unique(root[labels].numpy())] ^= rng.integers(1, 2**63, dtype=np.uint64)
    # Classes that no weight makes (of buffers, of padding) are no units: nothing would choose among them.
    live = np.flatnonzero(order < never)
    live = live[live != MUST_STAY]
    key = makers_key[live]
    kinds, kind = np.unique(key, return_inverse=True)
    kind_first = np.full(kinds.size, never, dtype=np.int64)
    np.minimum.at(kind_first, kind, order[live])
    # lexsort has its primary key last: runs in the order of their first unit, units of a run in order of execution.
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


def making_axes(ctx: Context) -> list[Made]:
    """Every axis of a weight or an embedding that makes channels."""
    axes = [(use.name, use.out_axis) for use in ctx.uses.values()]
    axes += [(name, 1) for name in sorted(ctx.tables)]
    axes += [axis for axis in ctx.makers if axis not in set(axes)]
    fields = [(name, axis, ctx.axis_field(ctx.axis_fields(name), axis)) for name, axis in axes]
    return [Made(name, axis, f.labels.flatten()) for name, axis, f in fields if f is not None]


def assemble(ctx: Context) -> Coupling:
    """Builds the coupling. Classes that weights make become units; units with the same makers become a group."""
    made = making_axes(ctx)
    root, why = ctx.labels.classes()
    units = _number(root, made, ctx.parts)
    alone = [r.start for r in units.runs if r.stop - r.start < 2]
    # One pass is enough: the other classes, and so the other groups, stay as they are.
    if alone:  # one of each group must stay, so a group of one has nothing to spare
        labels = [int((units.of_label == a).nonzero()[0]) for a in alone]
        ctx.labels.stay(torch.tensor(labels), "the only unit of its group")
        root, why = ctx.labels.classes()
        units = _number(root, made, ctx.parts)

    fields: dict[str, tuple[Tensor, ...]] = {}
    for name, axis_fields in ctx.named_axes.items():
        unit_fields = units.fields(f.labels for f in axis_fields)
        if unit_fields:
            fields[name] = unit_fields
    producers = tuple(Producer(m.name, m.axis, u) for m in made for u in units.fields([m.labels]))
    return Coupling(
        weights=_weights(ctx),
        producers=producers,
        groups=_groups(ctx, units, fields, producers),
        fields=fields,
        kept=_unprunable(ctx, made, units, why),
        contractions=_contractions(ctx, units),
        shapes={n: s for n, s in ctx.exported.shapes.items() if n in ctx.exported.trainable},
        unknown_ops=dict(ctx.unknown),
        branches=_branches(ctx),
        scales=dict(ctx.scales),
        experts=expert_sets(ctx),
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
    # Papers leave the first convolution and the classifier dense; so do the patterns by default.
    first = next((u.name for u in ctx.uses.values() if u.op == "conv"), None)
    last = _classifiers(ctx)
    out = []
    for use in ctx.uses.values():
        role = "first convolution" if use.name == first else "classifier" if use.name in last else ""
        shape, unmaskable = ctx.exported.shapes[use.name], ctx.unmaskable.get(use.name, "")
        out.append(Weight(**asdict(use), shape=shape, macs=macs[use.name], role=role, unmaskable=unmaskable))
    return tuple(out)


_MOVES = FAKE_QUANTIZATION.union(
    "reshape view flatten squeeze unsqueeze alias dropout contiguous clone to _to_copy".split()  # noqa: SIM905
)
"""Ops that pass a value on unchanged."""


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
    for name, unit_fields in fields.items():
        use = ctx.uses.get(name) or ctx.training_uses.get(name)
        columns = None if use is None else use.in_axis
        for u in unit_fields:
            axes = tuple(d for d, n in enumerate(u.shape) if n > 1)
            kind = "rows" if (name, axes[0]) in rows else "columns" if columns == axes[0] else "entries"
            # Units are numbered run by run, so the run of a unit is found by bisection of the starts.
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
        levels = zip(*(path.split(".") for path in paths), strict=False)
        common = [parts[0] for parts in takewhile(lambda parts: len(set(parts)) == 1, levels)]
        name = ".".join(common) or "stream"
        seen[name] = seen.get(name, 0) + 1
        out.append(name if seen[name] == 1 else f"{name}#{seen[name]}")
    return out


def _unprunable(ctx: Context, made: Sequence[Made], units: _Units, why: Mapping[int, str]) -> tuple[Kept, ...]:
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
    return tuple(Contraction(p.module, p.weight, p.macs, units.fields(p.factors)) for p in ctx.products)


def _trace(ctx: Context, units: _Units, made: Sequence[Made], root: Int64[Tensor, " labels"]) -> Trace:
    nodes = []
    for node in ctx.exported.graph.nodes:
        if node.op != "call_function" or not ctx.in_trace(node):
            continue
        result = ctx.env.get(node, ())
        shape = shape_of(node)
        unit_fields: tuple[Tensor, ...] = ()
        if shape is not None and all(isinstance(f, Field) for f in result):
            unit_fields = units.fields(f.labels for f in result)  # type: ignore[union-attr]
        inputs = tuple(a.name for a in node.all_input_nodes if a.op == "call_function" and ctx.in_trace(a))
        nodes.append(Node(node.name, op_name(node), module_of(node), shape, unit_fields, inputs, within(node)))
    pads = {m: _padding(ctx, m) for m in ctx.pads}
    why = stays(ctx, [(m.name, m.labels) for m in made], root, units.of_label, {n.name: n.op for n in nodes})
    return Trace(
        tuple(nodes),
        dict(ctx.norms),
        pads,
        frozenset(ctx.counted),
        ctx.exported.scopes,
        stays=why,
        computed=_computed(ctx),
    )


def _computed(ctx: Context) -> dict[str, fx.Graph]:
    """The graphs of weights that are computed from one parameter each, element by element."""
    alone = {name: value for name, value in ctx.operands.items() if ctx.tensor_name(value) is None}
    same = {
        name: value
        for name, value in alone.items()
        if zero_sources(ctx, value)[name] == tuple(range(len(ctx.exported.shapes[name])))
        and ctx.shape(value) == ctx.exported.shapes[name]
    }
    return {name: weight_graph(ctx, value) for name, value in same.items()}


def _padding(ctx: Context, module: str) -> fx.Graph:
    """The graph of a module that only slices and pads, to stand for it with other amounts."""
    inner = ctx.nodes_of(module)
    graph = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    # `rewritable` has checked that the module has exactly one input.
    source = next(a for n in inner for a in n.all_input_nodes if a not in set(inner))
    values[source] = graph.placeholder("x")
    for node in inner:
        values[node] = graph.node_copy(node, lambda n: values[n])
        values[node].meta = {"name": node.name}
    graph.output(values[inner[-1]])
    return graph
