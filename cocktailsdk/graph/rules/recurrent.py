"""Recurrent layers: a position of the hidden state goes from every gate, layer and direction."""

from __future__ import annotations

from math import prod
from typing import Any

from torch import fx

from ..export import module_of
from ..labels import Field, Fields
from .contraction import consume
from .registry import Context, Product, Result, WeightUse, argument, rule
from .weights import weight_of

GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}


@rule(*GATES)
def recurrent(ctx: Context, node: fx.Node) -> Result:
    """``h = gates(W_ih x + b_ih, W_hh h + b_hh)``, layer by layer.

    A state that starts at zero and whose gates' rows are masked stays zero, so masked positions are exactly absent.
    One number holds the width of all layers and directions, so all lose the same positions. Packed sequences, states
    that are given, and projections are kept whole.
    """
    args: tuple[Any, ...] = node.args
    x, state, weights = args[:3]
    if node.target._overloadname != "input":  # type: ignore[union-attr]
        return _keep_unpruned(ctx, node, "a recurrent layer over packed sequences is kept whole")
    layers, directions = int(argument(node, "num_layers")), 2 if argument(node, "bidirectional") else 1
    # Two matrices for each cell, and two biases unless bias=False; a projection adds a third matrix, which is refused.
    per_cell = len(weights) // (layers * directions)
    states = [state] if isinstance(state, fx.Node) else list(state)
    # A state that does not start at zero keeps its value at masked positions.
    started = [s for s in states if getattr(s.target, "_opname", "") != "zeros"]
    hidden = ctx.shape(weights[1])[-1]
    if started or per_cell not in (2, 4) or hidden < 2:
        return _keep_unpruned(ctx, node, "a recurrent layer that is given its state, or projects it, is kept whole")
    gates = GATES[node.target._opname]  # type: ignore[union-attr]
    # One set of labels for all layers and directions, since hidden_size is one number.
    labels = ctx.labels.fresh(hidden)
    last = len(ctx.shape(x)) - 1
    steps = prod(ctx.shape(x)[:-1])
    inputs = ctx.fields(x)
    for layer in range(layers):
        for direction in range(directions):
            at = (layer * directions + direction) * per_cell
            w_ih, w_hh, *biases = weights[at : at + per_cell]
            for matrix, fields in ((w_ih, inputs), (w_hh, (Field(labels, zero=True),))):
                found = weight_of(ctx, matrix, 0, 1)
                if found is not None:
                    name, macs = found[0], steps * prod(ctx.shape(matrix))
                    ctx.products.append(Product(node, module_of(node), name, macs, ()))
                    ctx.uses.setdefault(name, WeightUse(name, module_of(node), "linear", 0, 1, 1))
                # The hidden state is (batch, hidden) in each step, but has one field here, along dimension 0 of its
                # labels.
                consume(ctx, fields, ctx.fields(matrix), last if matrix is w_ih else 0, 1)
            for tensor in (w_ih, w_hh, *biases):
                rows = ctx.axis_field(ctx.fields(tensor), 0)
                if rows is not None:
                    # Rows are stacked gate by gate: a position of the state goes from each gate.
                    ctx.labels.join(rows.labels.reshape(gates, hidden), labels)
        view = (1,) * last + (hidden * directions,)
        inputs = (Field(labels.repeat(directions).view(view), zero=True),)
    final = (Field(labels.view(*(1,) * last, hidden), zero=True),)
    return (inputs, final, final)[: len(node.meta["val"])]


@rule("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell")
def cell(ctx: Context, node: fx.Node) -> Result:
    """One step of a recurrent layer."""
    return _keep_unpruned(ctx, node, "a recurrent cell is kept whole")


def _keep_unpruned(ctx: Context, node: fx.Node, reason: str) -> tuple[Any, ...]:
    touched: Fields = tuple(f for source in node.all_input_nodes for f in ctx.fields(source))
    ctx.labels.stay_all(touched, reason)
    return tuple(() for _ in node.meta["val"]) if isinstance(node.meta["val"], (tuple, list)) else ()
