"""Finds residual branches: the operands of sums that can be dropped from a stream."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from .coupling import Scale
from .export import op_name, shape_of, within
from .rules import Context
from .training_mode import training_only

__all__ = ["Residual", "residuals"]

_KEEPS_ZERO = frozenset(
    """
    _to_copy abs adaptive_avg_pool2d alias avg_pool2d chunk clone contiguous div dropout elu expand feature_dropout
    flatten flip gelu getitem hardswish index index_select leaky_relu mean mish movedim narrow neg permute pixel_shuffle
    pixel_unshuffle prelu relu reshape roll select silu slice split split_with_sizes squeeze sum swapaxes t tanh to
    transpose type_as unbind unflatten unsqueeze view
    """.split()  # noqa: SIM905
)
"""Ops whose result is zero where their first operand is, whatever the others are."""

_NORMS = {"batch_norm": 1, "instance_norm": 1, "layer_norm": 2, "group_norm": 2, "rms_norm": 2}
"""Norms, with the place of their weight; their bias comes next."""


_OF_EXPERTS = ("grouped_mm", "_grouped_mm", "grouped_mm_fallback")
"""Products of rows with a stack of matrices. Their third operand says where rows end."""

_NONE = Scale("", None)


@dataclass(frozen=True)
class Residual:
    """The nodes and tensors of a residual branch.

    Attributes:
        nodes: The calls that nothing but the branch needs.
        tensors: Parameters that nothing else reads; with all of them zero the branch adds nothing.
        weights: Those parameters that are contracted with activations.
        modules: Paths of the largest modules that run nothing but the branch, in order of execution.
    """

    nodes: frozenset[fx.Node]
    tensors: tuple[str, ...]
    weights: tuple[str, ...]
    modules: tuple[str, ...]


def residuals(ctx: Context) -> tuple[Residual, ...]:
    """Every residual branch, in order of execution; of branches within branches the innermost.

    A branch ends in one operand of a sum. It starts from the other operand, from a term of that operand, or from a
    value computed from either. A block whose shortcut has its own weight therefore has no branch. The result of a
    branch must be zero once its own parameters are zero: it ends in a projection, norm or scale, with its own bias or
    without one.
    """
    finder = _Finder(ctx)
    found = []
    for node in finder.order:
        if node.op == "call_function" and op_name(node) in ("add", "sub") and len(node.all_input_nodes) == 2:
            first, second = node.all_input_nodes
            pairs = ((first, second), (second, first))
            for stream, end in pairs[:1] if op_name(node) == "sub" else pairs:
                branch = finder.branch(node, stream, end)
                if branch is not None:
                    found.append(branch)
                    break
    return tuple(b for b in found if not any(other.nodes < b.nodes for other in found))


class _Finder:
    """Look-up tables for finding the branches of a graph."""

    def __init__(self, ctx: Context) -> None:
        self.ctx = ctx
        self.order = [n for n in ctx.exported.graph.nodes if not training_only(n)]
        self.place = {node: i for i, node in enumerate(self.order)}
        self.live = {node: self._live(node) for node in self.order}
        self.products = {p.node: p.weight for p in ctx.products}
        self.behind: dict[fx.Node, int] = {}  # as bits, what a node was computed from, itself included
        self.readers: dict[str, set[fx.Node]] = {}
        for i, node in enumerate(self.order):
            # Sets of nodes as Python integers, one bit for each node: union is `|`, and a graph of thousands of nodes
            # needs a few hundred bytes for each instead of a set.
            bits = 1 << i
            for source in node.all_input_nodes:
                bits |= self.behind.get(source, 0)  # the output's of training mode have none
            self.behind[node] = bits
            name = ctx.tensor_name(node)
            if name is not None:
                self.readers.setdefault(name, set()).update(self.live[node])

    def _live(self, node: fx.Node) -> set[fx.Node]:
        """The calls that read a node, without those whose results nothing reads and checks of its metadata."""
        users = (u for u in node.users if not training_only(u))
        return {u for u in users if u not in self.ctx.dead and not op_name(u).startswith("_assert")}

    def branch(self, node: fx.Node, stream: fx.Node, end: fx.Node) -> Residual | None:
        """The branch that a sum of these two operands ends, if it is one."""
        if end.op != "call_function" or not shape_of(end) == shape_of(stream) == shape_of(node):
            return None
        if self.live[end] != {node}:
            return None
        nodes = {end}
        # Backwards from the end: a call belongs to the branch once all its readers do. One sweep is enough, since
        # readers come after what they read.
        for before in self.order[self.place[end] - 1 :: -1]:
            users = self.live[before] if before.op == "call_function" else None
            if users and users <= nodes:
                nodes.add(before)
        terms = self._terms(stream)
        sources = {s for n in nodes for s in n.all_input_nodes if s not in nodes}
        # A branch must start from the stream. Otherwise the sum joins two independent paths, such as text and image.
        if not any(self.behind[s] & terms for s in sources):
            return None
        exported = self.ctx.exported
        own = {
            name
            for name, users in self.readers.items()
            if users and users <= nodes and name in exported.trainable and name not in exported.shared
        }
        contracted = {self.products.get(n) for n in nodes}
        weights = tuple(name for name in self.ctx.uses if name in own & contracted)
        # The branch is dropped by masking its parameters, so they alone must make its end zero.
        zeros = _Zeros(self, nodes, own)
        if not weights or not zeros.zero(end) or any(zeros.divides(n) for n in nodes):
            return None
        return Residual(frozenset(nodes), tuple(n for n in self.readers if n in own), weights, self._modules(nodes))

    def _terms(self, stream: fx.Node) -> int:
        """As bits, a sum's operand and, where that is a sum itself, its terms."""
        terms, pending = 0, [stream]
        while pending:
            term = pending.pop()
            terms |= 1 << self.place[term]
            if term.op == "call_function" and op_name(term) == "add":
                pending += term.all_input_nodes
        return terms

    def _modules(self, nodes: set[fx.Node]) -> tuple[str, ...]:
        calls = [n for n in self.order if n.op == "call_function" and n not in self.ctx.dead]
        outside = {path for n in calls if n not in nodes and not op_name(n).startswith("_assert") for path in within(n)}
        largest = (next((path for path in within(n) if path not in outside), None) for n in calls if n in nodes)
        return tuple(dict.fromkeys(path for path in largest if path is not None))


class _Zeros:
    """Decides which values are zero once a branch's own parameters are. Unknown ops count as non-zero."""

    def __init__(self, finder: _Finder, nodes: set[fx.Node], own: set[str]) -> None:
        self._finder, self._nodes, self._own = finder, nodes, own
        self._known: dict[fx.Node, bool] = {}

    def zero(self, value: object) -> bool:
        """Whether an operand is."""
        if not isinstance(value, fx.Node):
            return False
        if value not in self._known:
            name = self._finder.ctx.tensor_name(value)
            self._known[value] = name in self._own if name is not None else value in self._nodes and self._made(value)
        return self._known[value]

    def divides(self, node: fx.Node) -> bool:
        """Whether a call would be 0 / 0 (a spectral norm's)."""
        return op_name(node) in ("div", "divide", "true_divide") and self.zero(node.args[1])

    def _made(self, node: fx.Node) -> bool:
        op, args, sources = op_name(node), [*node.args, None, None, None, None], node.all_input_nodes
        if op in ("mul", "matmul", "mm", "bmm", "mv", "dot", "vdot", "einsum", *_OF_EXPERTS):
            return any(self.zero(a) for a in sources)
        if op in ("add", "sub"):
            return len(sources) == 2 and all(self.zero(a) for a in sources)
        if op in ("cat", "stack", "concat"):
            return all(self.zero(a) for a in sources)
        if op in _NORMS:
            at = _NORMS[op]
            bias = args[at + 1]
            return self.zero(args[at]) and (op == "rms_norm" or bias is None or self.zero(bias))
        if op in ("addmm", "baddbmm"):
            return self.zero(args[0]) and (self.zero(args[1]) or self.zero(args[2]))
        # Zero values give a zero result; zero queries or keys do not (their softmax is uniform).
        if op == "scaled_dot_product_attention":
            return self.zero(args[2])
        if op == "linear" or op.startswith("conv"):
            return (self.zero(args[0]) or self.zero(args[1])) and (args[2] is None or self.zero(args[2]))
        if op == "_weight_norm":  # masked as a whole, its scale is zero and its direction is not
            ctx = self._finder.ctx
            return self.zero(args[0]) and ctx.scales.get(str(ctx.tensor_name(args[0])), _NONE).name != ""
        return op in _KEEPS_ZERO and self.zero(args[0])
