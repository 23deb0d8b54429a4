"""The last mend: a module whose code takes channel counts from shapes gets its own forward, with the right sizes.

``q.reshape(b, n, self.num_heads, c // self.num_heads)``, with ``c`` read from an input that lost channels of its own,
has no attribute to mend. Such a module is traced with its children as they are, and the numbers that must differ are
put in place.
"""

from __future__ import annotations

import inspect
import logging
import operator
from collections.abc import Mapping, Sequence
from typing import Any

from jaxtyping import Bool
from torch import Tensor, fx, nn

from .coupling import Node, Trace
from .mend import new_shape

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
SPLIT = {"split", "split_with_sizes", "tensor_split"}


class _Tracer(fx.Tracer):
    """Traces one module's own code; its children stay calls."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Every child is a leaf."""
        return True


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
        graph = _traced(original, *inputs)
        wide = _values(original, graph, *inputs)
    except Exception as error:  # tracing runs the user's code on stand-ins, so anything may happen
        log.debug("%s cannot be traced: %s", path, error)
        return None
    records = [n for n in trace.nodes if n.module == path]
    values: dict[fx.Node, Any] = {}
    runner = _Runner(slim, graph)
    bound = _bound(slim, *slim_inputs)
    try:
        for node in graph.nodes:
            if node.op == "placeholder":
                values[node] = bound.get(str(node.target), node.args[0] if node.args else None)
                continue
            if node.op == "output":
                break
            _edit(node, wide, values, records, keep)
            values[node] = runner.run_one(node, values)
    except Exception as error:
        log.debug("%s cannot be rewritten: %s", path, error)
        return None
    return graph


def _bound(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    signature = inspect.signature(type(module).forward)
    bound = signature.bind(module, *args, **kwargs)
    return dict(list(bound.arguments.items())[1:])


def _traced(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> fx.Graph:
    """The module's code for these inputs; what is no tensor is a constant, and stays an optional argument."""
    signature = inspect.signature(type(module).forward)
    given = _bound(module, args, kwargs)
    fixed: dict[str, Any] = {}
    for name, parameter in list(signature.parameters.items())[1:]:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            if given.get(name):
                raise TypeError("a variable number of arguments")
            continue
        value = given.get(name, parameter.default)
        if not isinstance(value, Tensor):
            fixed[name] = value
    graph = _Tracer().trace(module, concrete_args=fixed)
    for node in list(graph.nodes):
        if node.op != "placeholder":
            continue
        name = str(node.target).lstrip("*")
        base = next((n for n in fixed if name == n or name.startswith(n + "_")), None)
        if base is not None:
            for user in list(node.users):
                for last in list(user.users):
                    graph.erase_node(last)
                graph.erase_node(user)
            node.target = base
            node.name = base
            node.args = (fixed[base],)
    graph.lint()
    return graph


class _Runner:
    """Runs single nodes of a graph on a module's children and parameters."""

    def __init__(self, module: nn.Module, graph: fx.Graph) -> None:
        self._interpreter = fx.Interpreter(module, garbage_collect_values=False, graph=graph)

    def run_one(self, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
        """One node's value."""
        self._interpreter.env = values
        return self._interpreter.run_node(node)


def _values(module: nn.Module, graph: fx.Graph, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[fx.Node, Any]:
    """Every node's value in the original."""
    bound = _bound(module, args, kwargs)
    runner = _Runner(module, graph)
    values: dict[fx.Node, Any] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            values[node] = bound.get(str(node.target), node.args[0] if node.args else None)
        elif node.op != "output":
            values[node] = runner.run_one(node, values)
    return values


def _name(node: fx.Node) -> str:
    if node.op == "call_method":
        return str(node.target)
    return getattr(node.target, "__name__", "") if node.op == "call_function" else ""


def _edit(
    node: Any, wide: Mapping[fx.Node, Any], values: Mapping[fx.Node, Any], records: Sequence[Node], keep: Tensor
) -> None:
    """Puts the slim model's sizes into one call."""
    name = _name(node)
    out = wide[node]
    if name in SIZED and isinstance(out, Tensor):
        expected = _expected(records, SIZED[name], tuple(out.shape), keep)
        if expected is not None:
            first = 2 if name == "unflatten" else 1
            sizes = (
                node.args[first]
                if len(node.args) == first + 1 and isinstance(node.args[first], (tuple, list))
                else node.args[first:]
            )
            start = node.args[1] % wide[node.args[0]].dim() if name == "unflatten" else 0
            new = [_size(a, expected[start + i], wide, values) for i, a in enumerate(sizes)]
            node.args = (*node.args[:first], tuple(new)) if name == "unflatten" else (node.args[0], *new)
            if node.op == "call_function":
                node.args = (node.args[0], tuple(new))
    elif name in SPLIT and isinstance(out, (tuple, list)):
        dim = node.kwargs.get("dim", node.args[2] if len(node.args) > 2 else 0)
        expected_sizes = []
        for part in out:
            shape = _expected(records, "part", tuple(part.shape), keep)
            if shape is None:
                return
            expected_sizes.append(shape[dim])
        node.args = (node.args[0], expected_sizes)
        node.kwargs = {"dim": dim}
    elif (
        isinstance(out, Tensor) and node.op in ("call_function", "call_method") and node.target is not operator.getitem
    ):
        node.args = tuple(_constant(a, wide, values) for a in node.args)


def _expected(records: Sequence[Node], family: str, shape: tuple[int, ...], keep: Tensor) -> tuple[int, ...] | None:
    """The slim shape of a result that has this shape in the original."""
    ops = {
        "view": {"view", "reshape", "unflatten", "_unsafe_view"},
        "expand": {"expand"},
        "part": {"getitem", "slice", "narrow"},
    }[family]
    found = {new_shape(r, keep) for r in records if r.op in ops and r.shape == shape}
    if len(found) > 1:
        raise ValueError(f"results of shape {shape} become {sorted(found)}")
    return next(iter(found), None)


def _size(arg: Any, expected: int, wide: Mapping[fx.Node, Any], values: Mapping[fx.Node, Any]) -> Any:
    if isinstance(arg, fx.Node):
        return arg if values[arg] in (expected, -1) else expected
    return arg if arg == -1 else expected


def _constant(arg: Any, wide: Mapping[fx.Node, Any], values: Mapping[fx.Node, Any]) -> Any:
    """A number computed from a channel count is a constant of the original."""
    if (
        isinstance(arg, fx.Node)
        and isinstance(wide[arg], (int, float))
        and not isinstance(wide[arg], bool)
        and values[arg] != wide[arg]
    ):
        return wide[arg]
    return arg
