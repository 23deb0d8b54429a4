"""Finds mixtures of experts: a router whose largest outputs choose matrices from stacks."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise, takewhile
from typing import Any

from torch import fx

from .coupling import ExpertSet
from .export import module_of, op_name, shape_of
from .rules import Context
from .rules.registry import argument
from .training_mode import training_only

__all__ = ["expert_sets"]

_PASSES_LOGITS = frozenset("softmax _softmax sigmoid view reshape alias to _to_copy contiguous clone".split())  # noqa: SIM905
"""What a router may do to its logits before the largest are chosen: with a logit of -inf an expert is never among
them. Anything else, such as a bias of the choice alone (DeepSeek-V3) or groups of experts, is left out."""

_PASSES_STACKS = frozenset("alias to _to_copy contiguous clone transpose permute".split())  # noqa: SIM905
_PRODUCTS = frozenset({"grouped_mm", "_grouped_mm", "grouped_mm_fallback"})


def expert_sets(ctx: Context) -> tuple[ExpertSet, ...]:
    """Every set of experts of which some can go, in order of execution.

    A set counts if the router's logits are the result of one linear layer, of which nothing else reads the weight; if
    the chosen indices choose from stacks of matrices, or vectors, that nothing else reads; and if all of these are
    parameters of the model.
    """
    chosen = _chosen_from(ctx)
    found = (_expert_set(ctx, top, stacks) for top, stacks in chosen.items() if stacks)
    return tuple(s for s in found if s is not None)


def _expert_set(ctx: Context, top: fx.Node, stacks: dict[str, set[fx.Node]]) -> ExpertSet | None:
    logits = top.args[0]
    while isinstance(logits, fx.Node) and op_name(logits) in _PASSES_LOGITS:
        if op_name(logits) in ("softmax", "_softmax") and argument(logits, "dim") not in (-1, 1):
            return None
        logits = logits.args[0]
    if not isinstance(logits, fx.Node) or op_name(logits) != "linear" or len(shape_of(top.args[0]) or ()) != 2:
        return None
    router, bias = ctx.tensor_name(logits.args[1]), argument(logits, "bias")
    if router is None or argument(top, "dim", -1) not in (-1, 1):
        return None
    if not f".{router}".startswith(f".{module_of(logits)}.".replace("..", ".")):
        return None  # another module's weight, which a switch could not find there
    count, used = ctx.exported.shapes[router][0], {router: {logits}, **stacks}
    if bias is not None:
        name = ctx.tensor_name(bias)
        if name is None:
            return None
        used[name] = {logits}
    for name, users in used.items():
        own = name in ctx.exported.trainable and name not in ctx.exported.shared and set(ctx.readers(name)) <= users
        if not own or ctx.exported.shapes[name][0] != count:
            return None
    if (shape_of(top.args[0]) or ())[-1] != count or not any(len(ctx.exported.shapes[n]) == 3 for n in stacks):
        return None
    owners = [name.rpartition(".")[0].split(".") for name in used]
    common = takewhile(lambda parts: len(set(parts)) == 1, zip(*owners, strict=False))
    return ExpertSet(
        name=".".join(parts[0] for parts in common),
        module=module_of(logits),
        tensors=tuple(used),
        count=count,
        top_k=int(argument(top, "k")),
    )


def _chosen_from(ctx: Context) -> dict[fx.Node, dict[str, set[fx.Node]]]:
    """For each choice of the largest, the tensors that its indices choose from, with the calls that read these."""
    nodes = [n for n in ctx.exported.graph.nodes if n.op == "call_function" and not training_only(n)]
    out: dict[fx.Node, dict[str, set[fx.Node]]] = {n: {} for n in nodes if op_name(n) == "topk" and n not in ctx.dead}
    for node in nodes if out else ():
        for stack, index in _choices(node):
            path = [node, *_path_to_tensor(stack)]
            name = ctx.tensor_name(path[-1])
            # what is made of the parameter on the way to the choice must be read by nothing else
            alone = all(set(made.users) - ctx.dead == {reader} for reader, made in pairwise(path[:-1]))
            if name is None or not alone:
                continue
            tops = _tops_behind(index)
            if len(tops) == 1 and (top := tops.pop()) in out:
                out[top].setdefault(name, set()).add(path[-2])
    return out


def _choices(node: fx.Node) -> Iterator[tuple[Any, Any]]:
    """What a call chooses from along the first axis, and the operand that says what."""
    op, args = op_name(node), node.args
    if op in _PRODUCTS and len(args) > 2:
        yield args[1], args[2]
    elif op == "index" and isinstance(args[1], list | tuple) and len(args[1]) == 1:
        yield args[0], args[1][0]
    elif op == "index_select" and args[1] == 0:
        yield args[0], args[2]


def _tops_behind(value: Any) -> set[fx.Node]:
    """The choices of the largest that indices come from."""
    tops: set[fx.Node] = set()
    pending, seen = [value], set[fx.Node]()
    while pending:
        node = pending.pop()
        if not isinstance(node, fx.Node) or node in seen:
            continue
        seen.add(node)
        if op_name(node) == "topk":
            tops.add(node)
        else:
            pending += node.all_input_nodes
    return tops


def _path_to_tensor(value: Any) -> Iterator[fx.Node]:
    """The calls from a stack of matrices back to a parameter, as far as the first axis stays the first."""
    while isinstance(value, fx.Node):
        yield value
        op = op_name(value)
        args: tuple[Any, ...] = value.args
        if value.op != "call_function" or op not in _PASSES_STACKS:
            return
        rank = len(shape_of(args[0]) or ())
        if op == "transpose" and 0 in (int(args[1]) % rank, int(args[2]) % rank):
            return
        if op == "permute" and args[1][0] not in (0, -rank):
            return
        value = args[0]
