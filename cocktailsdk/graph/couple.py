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

from .coupling import STAYS, Contraction, Coupling, Group, Kept, Node, Producer, Touch, Trace, Weight
from .export import Exported, export, module_of, shape_of
from .labels import MUST_STAY, Field
from .rules import RULES, Context, WeightUse

__all__ = ["couple"]

log = logging.getLogger(__name__)


def couple(
    model: nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    exclude: Callable[[str], bool] | None = None,
) -> Coupling:
    """Finds a model's weights and which of its channels can only be removed together.

    Args:
        model: Any module; it is run in eval mode, without gradients, and left as it was.
        args: Example positional inputs.
        kwargs: Example keyword inputs.
        exclude: For a module's path, whether its output channels must all stay (its input columns may go).

    Returns:
        The coupling.

    Raises:
        ExportFailed: If ``torch.export`` cannot follow the model.
    """
    exported = export(model, args, kwargs)
    ctx = propagate(exported)
    if exclude is not None:
        for use in ctx.uses.values():
            if exclude(use.module):
                field = ctx.axis_field(ctx.axis_fields(use.name), use.out_axis)
                if field is not None:
                    ctx.labels.stay(field.labels, "excluded by the user")
    _rectangles(ctx)
    return _assemble(ctx)


def propagate(exported: Exported) -> Context:
    """Runs every node's rule, in order of execution."""
    ctx = Context(exported)
    for node in exported.graph.nodes:
        if node.op == "call_function":
            ctx.labels.because = f"{op_name(node)} in {module_of(node) or 'the model'} mixes these channels or needs them all"
            _apply(ctx, node)
        elif node.op == "output":
            ctx.labels.because = "an output of the model"
            for source in node.all_input_nodes:
                ctx.labels.stay_all(_flat(ctx, source))
    return ctx


def op_name(node: fx.Node) -> str:
    """An op's base name, without the mark of in-place ops."""
    if node.target is operator.getitem:
        return "getitem"
    name = getattr(node.target, "_opname", getattr(node.target, "__name__", str(node.target)))
    return name if name.startswith("__") else name.rstrip("_")


def _apply(ctx: Context, node: fx.Node) -> None:
    name = op_name(node)
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
    mutates = name != "getitem" and str(getattr(node.target, "_opname", "")).endswith("_") and not name.startswith("_")
    if mutates and isinstance(node.args[0], fx.Node) and node.args[0].op == "call_function":
        ctx.env[node.args[0]] = result


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
            survivor = max(varying, key=lambda d: (_distinct(now, d), now.shape[d]))
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
class _Units:
    """Units found: the unit of every label, and the weights that make each."""

    of_label: Int64[Tensor, " labels"]
    bounds: list[tuple[int, int, frozenset[str]]]


def _number(root: Int64[Tensor, " labels"], made: list[tuple[str, int, Int64[Tensor, " n"]]]) -> _Units:
    """Numbers the classes that weights make, group by group.

    Args:
        root: Root of every label.
        made: For each axis that makes channels its parameter, axis and labels.
    """
    n = root.numel()
    rng = np.random.default_rng(0)
    key = np.zeros(n, dtype=np.uint64)
    order = np.full(n, np.iinfo(np.int64).max, dtype=np.int64)
    position = 0
    members: dict[int, set[str]] = {}
    for name, _, labels in made:
        roots = root[labels].numpy()
        unique, first = np.unique(roots, return_index=True)
        key[unique] ^= rng.integers(1, 2**63, dtype=np.uint64)
        order[unique] = np.minimum(order[unique], position + first)
        position += roots.size
        del name
    key[MUST_STAY] = 0
    live = np.flatnonzero(order < np.iinfo(np.int64).max)
    live = live[live != MUST_STAY]
    first_of: dict[int, int] = {}
    for k, o in zip(key[live].tolist(), order[live].tolist(), strict=True):
        first_of[k] = min(first_of.get(k, o), o)
    ranked = sorted(live.tolist(), key=lambda r: (first_of[int(key[r])], order[r]))
    of_root = np.full(n, STAYS, dtype=np.int64)
    of_root[ranked] = np.arange(len(ranked))
    of_label = torch.from_numpy(of_root)[root]
    del members
    bounds: list[tuple[int, int, frozenset[str]]] = []
    start = 0
    for i in range(1, len(ranked) + 1):
        if i == len(ranked) or key[ranked[i]] != key[ranked[start]]:
            bounds.append((start, i, frozenset()))
            start = i
    makers: list[set[str]] = [set() for _ in bounds]
    group_of = np.zeros(max(len(ranked), 1), dtype=np.int64)
    for g, (a, b, _) in enumerate(bounds):
        group_of[a:b] = g
    for name, _, labels in made:
        units = of_label[labels]
        for g in np.unique(group_of[units[units >= 0].numpy()]):
            makers[int(g)].add(name)
    return _Units(of_label, [(a, b, frozenset(m)) for (a, b, _), m in zip(bounds, makers, strict=True)])


def _assemble(ctx: Context) -> Coupling:
    root, why = ctx.labels.classes()
    made: list[tuple[str, int, Int64[Tensor, " n"]]] = []
    for use in ctx.uses.values():
        field = ctx.axis_field(ctx.axis_fields(use.name), use.out_axis)
        if field is not None:
            made.append((use.name, use.out_axis, field.labels.flatten()))
    for name in sorted(ctx.tables - set(ctx.uses)):
        field = ctx.axis_field(ctx.axis_fields(name), 1)
        if field is not None:
            made.append((name, 1, field.labels.flatten()))
    # A unit of one group alone could never go: at least one of each group stays.
    units = _number(root, made)
    alone = [(a, b) for a, b, _ in units.bounds if b - a < 2]
    if alone:
        for a, _ in alone:
            label = int((units.of_label == a).nonzero()[0])
            ctx.labels.stay(torch.tensor([label]), "a group of one unit has nothing to spare")
        root, why = ctx.labels.classes()
        units = _number(root, made)

    fields: dict[str, tuple[Tensor, ...]] = {}
    for name, axis_fields in ctx.named_axes.items():
        held = tuple(u for f in axis_fields if bool(((u := units.of_label[f.labels]) != STAYS).any()))
        if held:
            fields[name] = held
    weights = _weights(ctx)
    producers = tuple(
        Producer(name, axis, u) for name, axis, labels in made if bool(((u := units.of_label[labels]) != STAYS).any())
    )
    return Coupling(
        weights=weights,
        producers=producers,
        groups=_groups(ctx, units, fields, producers),
        fields=fields,
        kept=_kept(ctx, made, units, why),
        contractions=_contractions(ctx, units),
        shapes={n: s for n, s in ctx.exported.shapes.items() if n in ctx.exported.trainable},
        unknown_ops=dict(ctx.unknown),
        trace=_trace(ctx, units),
    )


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
        out.append(Weight(use.name, use.module, use.op, shape, use.out_axis, use.in_axis, use.groups, macs[use.name], role))
    return tuple(out)


def _classifiers(ctx: Context) -> set[str]:
    """Weights whose product reaches an output of the model through nothing but movement and elementwise ops of one operand."""
    transparent = {"reshape", "view", "flatten", "squeeze", "unsqueeze", "alias", "dropout", "contiguous", "clone", "to", "_to_copy"}
    found = set()
    output = next(n for n in ctx.exported.graph.nodes if n.op == "output")
    products = {p.node: p.weight for p in ctx.products if p.weight is not None}
    for node in output.all_input_nodes:
        current = node
        while current not in products and current.op == "call_function" and op_name(current) in transparent:
            current = current.args[0]
        if current in products:
            found.add(products[current])
    return {name for name in found if name is not None}


def _groups(ctx: Context, units: _Units, fields: Mapping[str, tuple[Tensor, ...]], producers: Sequence[Producer]) -> tuple[Group, ...]:
    rows = {p.weight: p.axis for p in producers}
    uses: Mapping[str, WeightUse] = ctx.uses
    touches: list[list[Touch]] = [[] for _ in units.bounds]
    starts = torch.tensor([a for a, _, _ in units.bounds])
    widest = [1] * len(units.bounds)
    for name, held in fields.items():
        for u in held:
            axes = tuple(d for d, n in enumerate(u.shape) if n > 1)
            present = u[u != STAYS]
            owners, counts = torch.unique(torch.searchsorted(starts, present, right=True) - 1, return_counts=True)
            for g, count in zip(owners.tolist(), counts.tolist(), strict=True):
                kind = "rows" if rows.get(name) == axes[0] else "columns" if name in uses and axes[0] == uses[name].in_axis else "entries"
                touches[g].append(Touch(name, axes, kind))
                if kind == "rows":
                    a, b, _ = units.bounds[g]
                    widest[g] = max(widest[g], count // (b - a))
    names = _names([makers for _, _, makers in units.bounds])
    in_order = [w for w in [*uses, *sorted(ctx.tables)]]
    return tuple(
        Group(names[g], a, b, tuple(w for w in in_order if w in makers), tuple(touches[g]), widest[g])
        for g, (a, b, makers) in enumerate(units.bounds)
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
            n = next((i for i, (x, y) in enumerate(zip(common, parts, strict=False)) if x != y), min(len(common), len(parts)))
            common = common[:n]
        name = ".".join(common) or "stream"
        seen[name] = seen.get(name, 0) + 1
        out.append(name if seen[name] == 1 else f"{name}#{seen[name]}")
    return out


def _kept(ctx: Context, made: Sequence[tuple[str, int, Tensor]], units: _Units, why: Mapping[int, str]) -> tuple[Kept, ...]:
    out = []
    for name, _, labels in made:
        staying = labels[units.of_label[labels] == STAYS]
        if staying.numel():
            reason = next((why[i] for i in staying.tolist() if i in why), "nothing else goes with these channels")
            share = "" if staying.numel() == labels.numel() else f"{staying.numel()} of {labels.numel()} channels: "
            out.append(Kept(name, share + reason))
    out += [Kept(op, f"an op without a rule, used {n} times; what touches it is kept whole") for op, n in ctx.unknown.items()]
    return tuple(out)


def _contractions(ctx: Context, units: _Units) -> tuple[Contraction, ...]:
    out = []
    for p in ctx.products:
        factors = tuple(u for f in p.factors if bool(((u := units.of_label[f]) != STAYS).any()))
        out.append(Contraction(p.module, p.weight, p.macs, factors))
    return tuple(out)


def _trace(ctx: Context, units: _Units) -> Trace:
    nodes = []
    for node in ctx.exported.graph.nodes:
        if node.op != "call_function":
            continue
        result = ctx.env.get(node, ())
        shape = shape_of(node)
        held: tuple[Tensor, ...] = ()
        if shape is not None and all(isinstance(f, Field) for f in result):
            held = tuple(u for f in result if bool(((u := units.of_label[f.labels]) != STAYS).any()))  # type: ignore[union-attr]
        nodes.append(Node(node.name, op_name(node), module_of(node), shape, held))
    pads = {m: _padding(ctx, m, units) for m in ctx.pads}
    return Trace(tuple(nodes), dict(ctx.norms), pads)


def _padding(ctx: Context, module: str, units: _Units) -> fx.GraphModule:
    """The graph of a module that only slices and pads, to stand for it with other amounts."""
    del units
    inner = ctx.nodes_of(module)
    graph = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    source = next(a for n in inner for a in n.all_input_nodes if a not in set(inner))
    values[source] = graph.placeholder("x")
    for node in inner:
        values[node] = graph.node_copy(node, lambda n: values[n])
        values[node].meta = {"name": node.name}
    graph.output(values[inner[-1]])
    return fx.GraphModule(nn.Module(), graph)
