"""A module with code of its own: another's parameters, children and numbers under a rewritten forward.

``fx.GraphModule`` does nearly this, but ``torch.export`` does not note which of a graph module's calls are its own, so
labels could not be compared in a slim model that holds one.
"""

from __future__ import annotations

import importlib
import linecache
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from torch import fx, nn

from .layers import mean_of_all

__all__ = ["RewrittenModule", "with_forward"]


class RewrittenModule(nn.Module):
    """A module whose forward was rewritten; each has a class of its own, derived from the original's.

    Attributes:
        original: The class whose forward was rewritten.
        source: The forward, as Python.
        names: What the names in it stand for.
        shares: Of every mean over channels in it that counts absent ones, how many of the channels are left.
    """

    original: type[nn.Module]
    source: str
    names: Mapping[str, Any]
    shares: tuple[float, ...]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """For copying and pickling: the class is made again from its source."""
        cls = type(self)
        return _empty, (cls.original, cls.source, dict(cls.names), cls.shares), self.__dict__


def with_forward(module: nn.Module, graph: fx.Graph) -> RewrittenModule:
    """A module that runs a graph on another module's own parameters, children and attributes."""
    code = graph.python_code("self")
    names = {k: f"module {v.__name__}" if isinstance(v, ModuleType) else v for k, v in code.globals.items()}
    shares = tuple(float(n.args[3]) for n in graph.nodes if n.target is mean_of_all)
    made = _empty(module.original if isinstance(module, RewrittenModule) else type(module), code.src, names, shares)
    state = {k: v.copy() if isinstance(v, dict) else v for k, v in vars(module).items() if k != "forward"}
    made.__dict__.update(state)
    return made


def _empty(
    original: type[nn.Module], source: str, names: Mapping[str, Any], shares: tuple[float, ...]
) -> RewrittenModule:
    """An instance without attributes, of a class made from source."""
    scope = {
        key: importlib.import_module(v.removeprefix("module ")) if isinstance(v, str) else v for key, v in names.items()
    }
    file = f"<rewritten {original.__name__} {abs(hash(source)):x}>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)  # for tracebacks
    exec(compile(source, file, "exec"), scope)
    attributes = {
        "original": original,
        "forward": scope["forward"],
        "source": source,
        "names": dict(names),
        "shares": shares,
    }
    cls = type(original.__name__, (RewrittenModule, original), {**attributes, "__module__": __name__})
    made: RewrittenModule = cls.__new__(cls)  # type: ignore[call-overload]
    nn.Module.__init__(made)
    return made
