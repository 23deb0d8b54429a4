"""The last fix: a module whose code takes channel counts from shapes gets its own forward, with the right sizes.

``q.reshape(b, n, self.num_heads, c // self.num_heads)``, with ``c`` read from an input that lost channels of its own,
has no attribute to fix. Such a module is traced with its children as they are, and the numbers that must differ are
put in place.
"""

from __future__ import annotations

import logging
import operator
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, fx, nn

from .coupling import Node, Trace
from .layers import expect_still, layer_norm_of_all, mean_of_all, standardised_of_all, variance_of_all
from .module_tracer import Runner, bound_to, traced, values_of
from .surviving import new_shape, surviving_along

__all__ = ["rewritten"]

log = logging.getLogger(__name__)

SIZED = {
    "view": "view",
    "reshape": "view",
    "unflatten": "view",
    "expand": "expand",
    "broadcast_to": "expand",
    "_unsafe_view": "view",
}
FAMILIES = {
    "view": {"view", "reshape", "unflatten", "_unsafe_view"},
    "expand": {"expand"},
    "part": {"getitem", "slice", "narrow"},
}
SPLIT = {"split", "split_with_sizes", "tensor_split"}


def rewritten(
    original: nn.Module,
    slim: nn.Module,
    path: str,
    inputs: tuple[tuple[Any, ...], Mapping[str, Any]],
    slim_inputs: tuple[tuple[Any, ...], Mapping[str, Any]],
    trace: Trace,
    keep: Bool[Tensor, " units_and_stays"],
) -> fx.Graph | None:
    """A module's own code with the sizes that the slim model needs.

    Args:
        original: The module of the original.
        slim: The module of the slim copy.
        path: Its path.
        inputs: What the original's was called with.
        slim_inputs: What the slim copy's is called with.
        trace: The original model's trace.
        keep: For each unit whether it stays; a last entry for what belongs to no unit.

    Returns:
        The graph, or ``None`` if its code cannot be traced or its sizes not be told.
    """
    try:
        graph = traced(original, *inputs)
        original_values = values_of(original, graph, *inputs)
    except Exception as error:  # tracing runs the user's code on stand-ins, so anything may happen
        log.debug("%s cannot be traced: %s", path, error)
        return None
    own = [n for n in trace.nodes if n.module == path]
    input_names = {name for n in own for name in n.inputs}
    nearby = [n for n in trace.nodes if n.module == path or n.name in input_names]
    values: dict[fx.Node, Any] = {}
    obsolete: list[fx.Node] = []
    editor = _Editor(original_values, values, own, nearby, keep)
    runner = Runner(slim, graph)
    bound = bound_to(slim, *slim_inputs)
    try:
        for node in graph.nodes:
            if node.op == "placeholder":
                values[node] = bound.get(str(node.target), node.args[0] if node.args else None)
                continue
            if node.op == "output":
                break
            editor.edit(node)
            if node.target is expect_still and bool(values[node.args[0]]) is not node.args[1]:
                obsolete.append(node)  # it came out otherwise by the widths alone, not by what the model was given
                continue
            try:
                values[node] = runner.run_one(node, values)
            except ArithmeticError:  # a number made of widths, which what reads it has as a constant of the original
                values[node] = None
                obsolete.append(node)
        # Readers before what they read: fx refuses to erase a node that has users.
        for node in reversed(obsolete):
            graph.erase_node(node)
    except Exception as error:
        log.debug("%s cannot be rewritten: %s", path, error)
        return None
    return graph


def _name(node: fx.Node) -> str:
    if node.op == "call_method":
        return str(node.target)
    return getattr(node.target, "__name__", "") if node.op == "call_function" else ""


def _arguments(node: fx.Node, *names: str) -> dict[str, Any]:
    """A call's arguments by name, whichever way they were passed."""
    return dict(zip(names, node.args, strict=False)) | dict(node.kwargs)


def _call_instead(node: Any, function: Callable[..., Tensor], *args: Any) -> None:
    """Lets a node call a function, whatever it called."""
    node.op, node.target, node.args, node.kwargs = "call_function", function, args, {}


def _share(dim: int | Sequence[int] | None, before: Sequence[int], now: Sequence[int]) -> tuple[tuple[int, ...], float]:
    """The dimensions that are reduced, and how much is left along them."""
    dims = tuple(range(len(before))) if dim is None else (dim,) if isinstance(dim, int) else tuple(dim)
    return dims, prod(now[d] for d in dims) / prod(before[d] for d in dims)


def _centred(node: Any, *, squared: bool) -> fx.Node | None:
    """``x``, where a node is ``x - x.mean(…)``, or that squared, and the mean counts absent channels."""
    if squared:
        exponent = node.args[1] if len(node.args) > 1 else 2
        if _name(node) not in ("pow", "square", "mul") or not (exponent == 2 or exponent is node.args[0]):
            return None
        node = node.args[0]
    if not isinstance(node, fx.Node) or _name(node) != "sub":
        return None
    x, mean = node.args[:2]
    same = isinstance(mean, fx.Node) and mean.target is mean_of_all and mean.args[0] is x
    return x if same and isinstance(x, fx.Node) else None


class _Editor:
    """Puts the slim model's sizes into a module's calls, one after the other.

    Args:
        wide: Every node's value in the original.
        values: The values in the slim copy, of the nodes done so far.
        own: What the whole model's trace says of the module's own calls.
        nearby: The same, with the calls that made their inputs.
        keep: For each unit whether it stays; a last entry for what belongs to no unit.
    """

    def __init__(
        self,
        wide: dict[fx.Node, Any],
        values: dict[fx.Node, Any],
        own: Sequence[Node],
        nearby: Sequence[Node],
        keep: Tensor,
    ) -> None:
        self._wide, self._values, self._own, self._nearby, self._keep = wide, values, own, nearby, keep
        self._sliced = {name for r in nearby if r.op in FAMILIES["part"] for name in r.inputs}
        self._uses: Counter[tuple[str, tuple[int, ...]]] = Counter()

    def edit(self, node: Any) -> None:
        """Edits one call, whose operands have been run."""
        name, out = _name(node), self._wide[node]
        if name in SIZED and isinstance(out, Tensor):
            self._view(node, name, out)
        elif name in SPLIT and isinstance(out, (tuple, list)):
            self._split(node, out)
        elif name == "mean" and isinstance(out, Tensor):
            self._mean(node)
        elif name in ("var", "std") and isinstance(out, Tensor):
            self._deviation(node, name)
        elif name == "narrow" and isinstance(out, Tensor):
            self._narrow(node)
        elif name == "batch_norm":
            self._standardisation(node)
        elif name == "layer_norm":
            self._layer_norm(node)
        elif node.target is operator.getitem:
            if isinstance(out, Tensor) and isinstance(self._wide[node.args[0]], Tensor):
                self._slices(node)
        elif isinstance(out, Tensor) and node.op in ("call_function", "call_method"):
            node.args = tuple(self._constant(a) for a in node.args)

    def _view(self, node: Any, name: str, out: Tensor) -> None:
        expected = self._expected(SIZED[name], tuple(out.shape))
        if expected is None:
            return
        first = 2 if name == "unflatten" else 1
        alone = node.args[first] if len(node.args) == first + 1 else None
        if isinstance(alone, fx.Node) and isinstance(self._wide[alone], tuple):
            node.args = (*node.args[:first], *self._parts(node, alone))
        listed = isinstance(alone, (tuple, list))
        sizes = node.args[first] if listed else node.args[first:]
        start = node.args[1] % self._wide[node.args[0]].dim() if name == "unflatten" else 0
        new = tuple(self._size(a, expected[start + i]) for i, a in enumerate(sizes))
        node.args = (*node.args[:first], new) if listed else (*node.args[:first], *new)

    def _parts(self, before: fx.Node, shape: fx.Node) -> list[fx.Node]:
        """A whole shape, given as one value, in its numbers."""
        out = []
        for i, (was, now) in enumerate(zip(self._wide[shape], self._values[shape], strict=True)):
            with before.graph.inserting_before(before):
                part = before.graph.call_function(operator.getitem, (shape, i))
            self._wide[part], self._values[part] = was, now
            out.append(part)
        return out

    def _split(self, node: Any, parts: Sequence[Tensor]) -> None:
        dim = node.kwargs.get("dim", node.args[2] if len(node.args) > 2 else 0)
        sizes = []
        for part in parts:
            shape = self._expected("part", tuple(part.shape))
            if shape is None:
                return
            sizes.append(shape[dim])
        node.args, node.kwargs = (node.args[0], sizes), {"dim": dim}

    def _mean(self, node: Any) -> None:
        """A mean over channels goes on dividing by how many there were."""
        call = _arguments(node, "input", "dim", "keepdim")
        before, now = self._wide[call["input"]].shape, self._values[call["input"]].shape
        dims, share = _share(call.get("dim"), before, now)
        if share == 1:
            return
        centred = _centred(call["input"], squared=True)
        keepdim = bool(call.get("keepdim", False))
        if centred is None:
            _call_instead(node, mean_of_all, call["input"], dims, keepdim, share)
        else:
            _call_instead(node, variance_of_all, centred, dims, keepdim, share, 0, False)

    def _deviation(self, node: Any, name: str) -> None:
        """A variance over channels goes on counting those there were."""
        arguments = dict(node.kwargs)
        rest = list(node.args[1:])
        if rest and not isinstance(rest[0], bool):
            arguments["dim"] = rest.pop(0)
        arguments |= dict(zip(("unbiased", "keepdim"), rest, strict=False))
        dims, share = _share(arguments.get("dim"), self._wide[node.args[0]].shape, self._values[node.args[0]].shape)
        if share != 1:
            correction = arguments.get("correction", int(arguments.get("unbiased", True)))
            source = _centred(node.args[0], squared=False) or node.args[0]
            keepdim = bool(arguments.get("keepdim", False))
            _call_instead(node, variance_of_all, source, dims, keepdim, share, correction, name == "std")

    def _narrow(self, node: Any) -> None:
        """A run of channels, told by its start and length."""
        call = _arguments(node, "input", "dim", "start", "length")
        source, dim = call["input"], call["dim"]
        before, now = self._wide[source].shape, self._values[source].shape
        if before[dim] == now[dim]:
            return
        surviving = self._surviving(tuple(before), dim % len(before))
        if surviving is None:
            raise ValueError("a run of channels that cannot be followed")
        start, length = (self._wide[v] if isinstance(v, fx.Node) else v for v in (call["start"], call["length"]))
        first = int(surviving[:start].sum())
        node.args, node.kwargs = (source, dim, first, int(surviving[: start + length].sum()) - first), {}

    def _standardisation(self, node: Any) -> None:
        """A weight's rows go on being standardised by their original fan-in."""
        names = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
        call = _arguments(node, *names)
        before, now = self._wide[call["input"]], self._values[call["input"]]
        if call.get("training") and before.dim() == 3 and before.shape[2] != now.shape[2]:
            share = now.shape[2] / before.shape[2]
            affine = call.get("weight"), call.get("bias")
            _call_instead(node, standardised_of_all, call["input"], *affine, call.get("eps", 1e-5), share)

    def _layer_norm(self, node: Any) -> None:
        """A LayerNorm inside other code goes on counting the channels there were."""
        call = _arguments(node, "input", "normalized_shape", "weight", "bias", "eps")
        before, now = self._wide[call["input"]].shape, self._values[call["input"]].shape
        if before[-1] != now[-1]:
            affine = call.get("weight"), call.get("bias")
            _call_instead(node, layer_norm_of_all, call["input"], *affine, call.get("eps", 1e-5), before[-1])

    def _slices(self, node: Any) -> None:
        """Runs of channels begin and end where those that are left do."""
        source, index = node.args
        before, now = self._wide[source].shape, self._values[source].shape
        parts = list(index) if isinstance(index, tuple) else [index]
        if any(p is Ellipsis for p in parts):
            at = next(i for i, p in enumerate(parts) if p is Ellipsis)
            missing = len(before) - sum(p is not None and p is not Ellipsis for p in parts)
            parts[at : at + 1] = [slice(None)] * missing
        dim = 0
        for i, part in enumerate(parts):
            if part is None:
                continue
            if isinstance(part, slice) and before[dim] != now[dim]:
                bounds = (self._wide[v] if isinstance(v, fx.Node) else v for v in (part.start, part.stop, part.step))
                start, stop, step = slice(*bounds).indices(before[dim])
                if (start, stop, step) != (0, before[dim], 1):
                    surviving = self._surviving(tuple(before), dim)
                    if surviving is None or step != 1:
                        raise ValueError("a slice of channels that cannot be followed")
                    parts[i] = slice(int(surviving[:start].sum()), int(surviving[:stop].sum()))
            dim += 1
        node.args = (source, tuple(parts))

    def _surviving(self, shape: tuple[int, ...], dim: int) -> Tensor | None:
        """Which positions are left along a dimension of the tensor of that shape which the module slices."""
        same_shape = [r for r in self._nearby if r.shape == shape]
        fields = [u for r in [r for r in same_shape if r.name in self._sliced] or same_shape for u in r.units]
        found = [surviving[dim] for units in fields if dim in (surviving := surviving_along(units, self._keep))]
        # Two tensors of one shape with other channels left: which of them is sliced cannot be told from the shape.
        return found[0] if found and all(torch.equal(f, found[0]) for f in found) else None

    def _expected(self, family: str, shape: tuple[int, ...]) -> tuple[int, ...] | None:
        """The slim shape of the next result that has this shape in the original."""
        found = [new_shape(r, self._keep) for r in self._own if r.op in FAMILIES[family] and r.shape == shape]
        # The traced code and the exported graph list calls of one family in the same order, but not one for one: equal
        # shapes are matched in order of appearance, the last one for the rest.
        nth = self._uses[family, shape]
        self._uses[family, shape] += 1
        return found[min(nth, len(found) - 1)] if found else None

    def _size(self, arg: Any, expected: int) -> Any:
        if isinstance(arg, fx.Node):
            return arg if self._values[arg] in (expected, -1) else expected
        return arg if arg == -1 else expected

    def _constant(self, arg: Any) -> Any:
        """A number computed from a channel count is a constant of the original."""
        if not isinstance(arg, fx.Node) or isinstance(self._wide[arg], bool):
            return arg
        before = self._wide[arg]
        return before if isinstance(before, (int, float)) and self._values[arg] != before else arg
