"""A module's own code as a graph, found by running it on stand-ins beside real values."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, fx, nn

from .layers import expect, expect_still

__all__ = ["Runner", "bound_to", "traced", "values_of"]


class _Tracer(fx.Tracer):
    """Traces one module's own code; its children stay calls.

    The code runs on real values beside, so that it may branch on sizes and unpack shapes, which the rewritten code then
    checks. Values of tensors decide nothing.

    Args:
        module: The module.
        arguments: Its inputs by name.
    """

    # Buffers must be nodes too: a rewritten forward reads them from the slim module, where they are narrower.
    proxy_buffer_attributes = True

    def __init__(self, module: nn.Module, arguments: Mapping[str, Any]) -> None:
        super().__init__()
        self._module, self._arguments = module, arguments
        self._values: dict[fx.Node, Any] = {}
        self._running = False

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Every child is a leaf."""
        return True

    def create_proxy(self, kind: str, target: Any, *args: Any, **kwargs: Any) -> fx.Proxy:
        """Notes the value of each node as it is made."""
        if (kind, target) == ("call_method", "__call__") and isinstance(self._values[args[0][0].node], bool):
            return self.to_bool(args[0][0])  # type: ignore[return-value]  # it takes conditions, or functions that give them
        proxy = super().create_proxy(kind, target, *args, **kwargs)
        if kind == "placeholder":
            self._values[proxy.node] = self._arguments[target]
        elif kind != "output":
            self._running = True
            try:
                self._values[proxy.node] = Runner(self._module, self.graph).run_one(proxy.node, self._values)
            finally:
                self._running = False
        return proxy

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Calls of children are traced, but not those that run to give a value."""
        return forward(*args, **kwargs) if self._running else super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """Likewise parameters."""
        return attr_val if self._running else super().getattr(attr, attr_val, parameter_proxy_cache)

    def create_arg(self, a: Any) -> Any:
        """Notes the value of constants, too."""
        arg = super().create_arg(a)
        if isinstance(arg, fx.Node) and not isinstance(a, fx.Node | fx.Proxy):
            self._values[arg] = a
        return arg

    def to_bool(self, obj: fx.Proxy) -> bool:
        """What a condition on sizes, types or devices was."""
        value = self._values[obj.node]
        if isinstance(value, Tensor):
            return super().to_bool(obj)
        self.create_proxy("call_function", expect_still, (obj, bool(value)), {})
        return bool(value)

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        """The parts of a shape or of several results."""
        value = self._values[obj.node]
        parts: Any = obj
        return iter([parts[i] for i in range(len(value))]) if isinstance(value, tuple | list) else super().iter(obj)


def bound_to(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that a module's forward was given, by name."""
    signature = inspect.signature(type(module).forward)
    bound = signature.bind(module, *args, **kwargs)
    return dict(list(bound.arguments.items())[1:])


def traced(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> fx.Graph:
    """The module's code for these inputs.

    Tensors, numbers and tuples stay arguments. Flags and what was not given are constants of the code; a call that
    gives another value is refused (:func:`cocktailsdk.graph.layers.expect`).
    """
    parameters = dict(list(inspect.signature(type(module).forward).parameters.items())[1:])
    bound = bound_to(module, args, kwargs)
    for name, parameter in parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD) and bound.get(name):
            raise TypeError("a variable number of arguments")
    names = [n for n, p in parameters.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    constant = {n: bound.get(n, parameters[n].default) for n in names}
    live = [n for n in names if not (constant[n] is None or isinstance(constant[n], bool | str))]
    fixed = {n: constant[n] for n in names if n not in live}

    # A stand-in that shares everything with the module but takes the live arguments only.
    # fx makes a placeholder of every argument, but flags must stay values. The code is wrapped in a function that takes
    # only the live arguments.
    code = (
        f"def forward(self, {', '.join(live)}):\n    return own(self, {', '.join(f'{n}={n}' for n in live)}, **fixed)"
    )
    scope: dict[str, Any] = {"own": type(module).forward, "fixed": fixed}
    exec(code, scope)
    stand_in: nn.Module = module.__new__(type(type(module).__name__, (type(module),), {"forward": scope["forward"]}))
    # Not a copy: parameters and children must be those of the module, so that their paths in the graph are right.
    stand_in.__dict__ = module.__dict__
    graph = _Tracer(module, constant).trace(stand_in)

    placeholders = {str(n.target): n for n in graph.nodes if n.op == "placeholder"}
    first = next(n for n in graph.nodes if n.op != "placeholder")
    optional = False
    for name in names:
        if name in placeholders:
            node = placeholders[name]
            # The order of placeholders becomes the order of arguments of the generated forward, which must be the
            # original's.
            first.prepend(node)
            if parameters[name].default is not inspect.Parameter.empty:
                node.args, optional = (parameters[name].default,), True
            # Python allows no argument without a default after one with a default.
            elif optional and not node.args:
                node.args = (None,)
        else:
            optional = True
            with graph.inserting_before(first):
                node = graph.placeholder(name, default_value=fixed[name])
            placeholders[name] = node
    with graph.inserting_before(first):
        for name, value in fixed.items():
            graph.call_function(expect, (placeholders[name], value, name))
    graph.lint()
    return graph


class Runner:
    """Runs single nodes of a graph on a module's children and parameters."""

    def __init__(self, module: nn.Module, graph: fx.Graph) -> None:
        self._interpreter = fx.Interpreter(module, garbage_collect_values=False, graph=graph)

    def run_one(self, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
        """One node's value."""
        self._interpreter.env = values
        return self._interpreter.run_node(node)


def values_of(module: nn.Module, graph: fx.Graph, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[fx.Node, Any]:
    """Every node's value in the original."""
    bound = bound_to(module, args, kwargs)
    runner = Runner(module, graph)
    values: dict[fx.Node, Any] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            values[node] = bound.get(str(node.target), node.args[0] if node.args else None)
        elif node.op != "output":
            values[node] = runner.run_one(node, values)
    return values
