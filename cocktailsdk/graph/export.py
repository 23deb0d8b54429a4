"""A model as an fx graph of ATen calls, with shapes on every node."""

from __future__ import annotations

import io
import logging
import textwrap
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import ExitStack, contextmanager, redirect_stderr
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.utils._pytree import tree_leaves

from ..errors import ExportFailed
from ..utils.modes import evaluating
from ..utils.undo import Snapshot, unchanged
from .grouped_mm import ExportableGroups
from .output_tensors import tensors_of
from .unsupported import hookable, is_scripted, refuse_unsupported

__all__ = ["BuildsParameters", "Exported", "export", "module_of", "op_name", "shape_of", "within"]

log = logging.getLogger(__name__)

Inputs = tuple[tuple[Any, ...], dict[str, Any]]

RETURNABLE = (Tensor, bool, int, float, complex, str, torch.SymInt, torch.SymFloat, torch.SymBool)
"""What an exported program may return."""


class BuildsParameters(ExportFailed):
    """The model's first forward pass builds parameters, so the model that was given does not have them."""


@dataclass(frozen=True)
class Exported:
    """An exported model.

    Attributes:
        graph: Nodes are ATen calls; ``meta["val"]`` holds fake tensors.
        tensors: For each placeholder that is a parameter or buffer the name it has in the model.
            A tied parameter has the first of its names everywhere.
        shapes: The shape of each of these tensors.
        trainable: Names of the tensors that are parameters.
        scopes: Paths of the submodules that the graph is made of; ``("",)`` where the whole model was exported.
        failures: Where it was not: by path, why a module is no scope.
        shared: Tensors that a scope shares with code that is in none.
    """

    graph: fx.Graph
    tensors: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]
    trainable: frozenset[str]
    scopes: tuple[str, ...] = ("",)
    failures: Mapping[str, str] = field(default_factory=dict)
    shared: frozenset[str] = frozenset()


def export(model: nn.Module, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> Exported:
    """Exports a model in eval mode; the model is left as it was.

    If ``torch.export`` cannot trace the whole model, the model is run once with hooks. Then the largest submodules that
    can be traced on the recorded inputs are exported instead: the scopes.

    Raises:
        ExportFailed: If the model does not run on these inputs, or nothing of it that holds parameters can be followed.
    """
    if not args and not kwargs:
        raise ExportFailed(
            f"{type(model).__name__}: the graph is found by running the model, but no example inputs were given. "
            "Pass example_inputs=(x,) or example_kwargs={...}."
        )
    refuse_unsupported(model)
    inputs, own = (tuple(args), dict(kwargs or {})), _names(model)
    failures: dict[str, str] = {}
    with warnings.catch_warnings(), silenced(), torch.no_grad():
        warnings.simplefilter("ignore")
        programs = _programs(model, inputs, own, failures)
    if not programs:
        raise ExportFailed(
            f"{type(model).__name__} could not be exported on the example inputs ({failures['']}), nor could any of "
            "its submodules. Check that its control flow does not depend on tensor values."
        )
    if "" not in programs:
        why, parts = failures[""], len(programs)
        log.info("%s could not be exported (%s); following %d parts of it", type(model).__name__, why, parts)
    return with_modules(model, merge(model, programs, failures))


def _programs(
    model: nn.Module, inputs: Inputs, own: AbstractSet[str], failures: dict[str, str]
) -> dict[str, ExportedProgram]:
    """The whole model, or else its largest parts that can be exported.

    A first forward pass may make what later ones find (anchors, a buffer, a mask in a dictionary). The model is traced
    as it is, if possible; then as it is after a pass on real tensors. Each attempt is undone before the next: what it
    leaves in the model are stand-ins without values.
    """
    with evaluating(model, clear_caches=True), unchanged(model) as before:
        program = _attempt(partial(export_whole, model, inputs), failures, "")
        _refuse_new_parameters(model, own)
        if program is not None:
            return {"": program}
        # An attempt that failed half-way leaves fake tensors in lazily made buffers; real tensors are needed next.
        before.restore()
        recorded = _recorded_inputs(model, inputs)
        _refuse_new_parameters(model, own)
        with unchanged(model) as warm:
            if before.restore():
                warm.restore()
                program = _attempt(partial(export_whole, model, inputs), failures, "")
                if program is not None:
                    return {"": program}
                warm.restore()
            return _scopes(model, recorded, failures, warm)


def _attempt(export_it: Callable[[], ExportedProgram], failures: dict[str, str], path: str) -> ExportedProgram | None:
    try:
        program = export_it()
    except Exception as error:
        failures[path] = _reason(error)
        return None
    failures.pop(path, None)
    return program


def _names(model: nn.Module) -> frozenset[str]:
    return frozenset(name for name, _ in model.named_parameters(remove_duplicate=False))


def _refuse_new_parameters(model: nn.Module, own: AbstractSet[str]) -> None:
    made = sorted(_names(model) - own)
    if made:
        raise BuildsParameters(
            f"{type(model).__name__} builds parameters in its first forward pass ({', '.join(made[:3])}"
            f"{', …' if len(made) > 3 else ''}), which it does not have yet. Run it once before: "
            "model(*example_inputs)."
        )


def _program(module: nn.Module, inputs: Inputs) -> ExportedProgram:
    with ExportableGroups():
        # Non-strict: the code runs as plain Python, so that dataclass outputs, hooks and decorators of transformers and
        # timm need no support from TorchDynamo.
        return torch.export.export(module, inputs[0], inputs[1], strict=False)


def export_whole(model: nn.Module, inputs: Inputs) -> ExportedProgram:
    """The whole model. Of outputs that ``torch.export`` does not know (a language model's cache) only tensors count."""
    foreign: list[bool] = []
    # What torch.export says of such an output differs between versions, so the output itself is looked at.
    with model.register_forward_hook(lambda _m, _inputs, output: foreign.append(_is_foreign(output))):
        try:
            return _program(model, inputs)
        except Exception:
            if not any(foreign):
                raise
    with model.register_forward_hook(lambda _m, _inputs, output: tuple(tensors_of(output))):
        return _program(model, inputs)


def _is_foreign(output: Any) -> bool:
    """Whether an output holds something of a type that ``torch.export`` cannot return."""
    return not all(leaf is None or isinstance(leaf, RETURNABLE) for leaf in tree_leaves(output))


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines() or ["no message"]
    return f"{type(error).__name__}: {textwrap.shorten(lines[0], 200, placeholder=' …')}"


def _recorded_inputs(model: nn.Module, inputs: Inputs) -> dict[str, Inputs]:
    """Records the inputs of every submodule in one run on real tensors."""
    recorded: dict[str, Inputs] = {}
    with ExitStack() as hooks:
        for path, m in hookable(model):

            def record(_m: nn.Module, args: Any, kwargs: Any, path: str = path) -> None:
                recorded.setdefault(path, (args, kwargs))

            hooks.enter_context(m.register_forward_pre_hook(record, with_kwargs=True))
        try:
            model(*inputs[0], **inputs[1])
        except Exception as error:
            raise ExportFailed(
                f"{type(model).__name__} does not run on the example inputs ({_reason(error)}). Pass inputs that it "
                "takes."
            ) from error
    return recorded


def _scopes(
    model: nn.Module, recorded: Mapping[str, Inputs], failures: dict[str, str], warm: Snapshot
) -> dict[str, ExportedProgram]:
    """Exports the largest submodules that ``torch.export`` can trace on their recorded inputs."""
    programs: dict[str, ExportedProgram] = {}
    # A stack in reverse, so that modules are tried in order of registration and a child right after its parent.
    pending = [path for path, _ in reversed(list(model.named_children()))]
    while pending:
        path = pending.pop()
        module = model.get_submodule(path)
        if next(module.parameters(), None) is None:
            continue
        if is_scripted(module):
            failures[path] = "TorchScript, whose code cannot be followed"
            continue
        if path in recorded:
            program = _attempt(partial(_program, module, recorded[path]), failures, path)
            warm.restore()
            if program is not None:
                programs[path] = program
                continue
        elif next(module.children(), None) is None:
            failures[path] = "it was not called as a module in the example run"
        pending += [f"{path}.{name}" for name, _ in reversed(list(module.named_children()))]
    return programs


def merge(model: nn.Module, programs: Mapping[str, ExportedProgram], failures: Mapping[str, str]) -> Exported:
    """One graph of all scopes, side by side, with every tensor under its first name in the model."""
    first: dict[int, str] = {}
    canonical: dict[str, str] = {}
    for name, tensor in [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]:
        # Tied parameters: all names of one tensor become the first, since one axis must have one set of labels.
        canonical[name] = first.setdefault(id(tensor), name)
    parameters = dict(model.named_parameters())
    shapes = {name: tuple(t.shape) for name, t in [*parameters.items(), *model.named_buffers()]}
    tensors: dict[str, str] = {}
    graph, outputs = fx.Graph(), []
    for path, program in programs.items():
        prefix = f"{path}." if path else ""
        tensor_names = {
            spec.arg.name: prefix + spec.target
            for spec in program.graph_signature.input_specs
            if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER) and spec.target is not None
        }
        if not path:  # the usual case needs no copy
            # A buffer that the example run registered is not the model's yet: it counts as a constant.
            tensors = {node: canonical[name] for node, name in tensor_names.items() if name in canonical}
            return Exported(program.graph, tensors, shapes, frozenset(parameters))
        values: dict[fx.Node, fx.Node] = {}
        for node in program.graph.nodes:
            if node.op == "output":
                outputs += [values[n] for n in node.all_input_nodes]
                continue
            values[node] = graph.node_copy(node, values.__getitem__)
            values[node].meta = {**node.meta, "scope": path}
            if tensor_names.get(node.name) in canonical:
                tensors[values[node].name] = canonical[tensor_names[node.name]]
    graph.output(tuple(outputs))
    outside = {canonical[name] for name in canonical if not any(name.startswith(f"{path}.") for path in programs)}
    shared = frozenset(outside.intersection(tensors.values()))
    return Exported(graph, tensors, shapes, frozenset(parameters), tuple(programs), dict(failures), shared)


def with_modules(model: nn.Module, exported: Exported) -> Exported:
    """Notes on every node the modules that ran it, each by the first of its paths where it has several."""
    first: dict[nn.Module, str] = {}
    known = {path: first.setdefault(m, path) for path, m in model.named_modules(remove_duplicate=False)}
    for node in exported.graph.nodes:
        stack, scope = node.meta.get("nn_module_stack"), node.meta.get("scope", "")
        path = str(list(stack.values())[-1][0]).split("@")[0] if stack else ""  # a module called again is 'name@1'
        parts = (f"{scope}.{path}" if scope and path else scope or path).split(".")
        paths = ("", *(".".join(parts[: i + 1]) for i in range(len(parts)))) if parts != [""] else ("",)
        node.meta["within"] = tuple(known.get(p, p) for p in paths)
    return exported


def shape_of(node: Any) -> tuple[int, ...] | None:
    """A node's shape, ``None`` where it is no tensor."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else node
    return tuple(int(s) for s in value.shape) if isinstance(value, Tensor) else None


def module_of(node: fx.Node) -> str:
    """Path of the innermost module that ran a node (``""`` for the model itself)."""
    return within(node)[-1]


def op_name(node: fx.Node) -> str:
    """An op's base name, without the mark of in-place ops."""
    name = getattr(node.target, "_opname", getattr(node.target, "__name__", str(node.target)))
    return name if name.startswith("__") else name.rstrip("_")


def within(node: fx.Node) -> tuple[str, ...]:
    """Paths of the modules that ran a node, from the model itself (``""``) to the innermost."""
    found: tuple[str, ...] = node.meta.get("within", ("",))
    return found


@contextmanager
def silenced() -> Iterator[None]:
    """Export's own log lines (guards it could not make, say) and the graphs that it prints mean nothing to users."""
    # This level also holds for the loggers below (torch.export, torch.fx) that have none of their own.
    logger = logging.getLogger("torch")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
