"""The other proof: labels run through the slim model's own graph are those that survived, in their order.

The comparison of values shows that slim and masked agree on one input. This one needs no values: the rules are run over
the slim model's graph as over any other, with labels that remember which unit of the original each position was. Where
the slim code splits, reshapes or orders channels otherwise than the original did, a call returns them in another number
or order.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor, nn

from ..errors import ExportFailed, SlimError
from .couple import Pass
from .coupling import STAYS, Node
from .cut import Cutter
from .labels import Field
from .rules.registry import MOVEMENT
from .surviving import surviving_along

__all__ = ["check_labels"]

UNKNOWN = -2
"""In place of a unit: this label belongs to nothing that the original cuts along one axis."""


def check_labels(
    slim: nn.Module, cutter: Cutter, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
) -> int:
    """Runs labels through a slim model and compares them with what the original's should have become.

    Args:
        slim: The slim model.
        cutter: What made it, with the original's coupling and trace.
        args: Example positional inputs.
        kwargs: Example keyword inputs.

    Returns:
        How many calls were compared.

    Raises:
        SlimError: If a call of the slim model returns other channels than those that survived, or in another order;
            the module is named.
    """
    try:
        found = Pass(slim, args, kwargs)
    except ExportFailed as error:
        raise SlimError(f"the slim {type(slim).__name__} can no longer be exported: {error}") from error
    return _calls(found, _origins(found, cutter), cutter)


def _origins(found: Pass, cutter: Cutter) -> Int64[Tensor, " labels"]:
    """For each of the slim model's labels the unit of the original that its position belongs to."""
    keep = cutter.keep
    origin = torch.full((found.n_labels,), UNKNOWN)
    for name, labels_of in found.tensors().items():
        for axis, units in _along_one_axis(cutter.coupling.fields.get(name, ())).items():
            surviving = units[keep[units]]
            # An axis of another length is found by the comparison of shapes below, with the module's name.
            if axis in labels_of and labels_of[axis].numel() == surviving.numel():
                origin[labels_of[axis]] = surviving
    return origin


def _along_one_axis(fields: Iterable[Tensor]) -> dict[int, Tensor]:
    """Units by axis, of axes along which one field varies and nothing else does."""
    out: dict[int, Tensor] = {}
    several: set[int] = set()
    for units in fields:
        axes = [d for d, n in enumerate(units.shape) if n > 1]
        if len(axes) != 1 or axes[0] in out:
            several.update(axes)
        else:
            out[axes[0]] = units.flatten()
    return {axis: units for axis, units in out.items() if axis not in several}


def _calls(found: Pass, units: Int64[Tensor, " labels"], cutter: Cutter) -> int:
    """Compares the results of every call with a counterpart in the original."""
    ours, theirs = found.calls(), _by_module(cutter.trace.nodes)
    compared = 0
    for module, was in theirs.items():
        now = ours.get(module, [])
        if [op for op, *_ in now] != [n.op for n in was]:  # a replaced norm, say: only its result must be the same
            now, was = now[-1:], was[-1:]
        last = was[-1]
        for (op, shape, fields), node in zip(now, was, strict=True) if now else ():
            # On the way, data may move otherwise (two groups of one or one of two): what is computed, and what a module
            # ends with, may not differ.
            if op in MOVEMENT and node is not last:
                continue
            if node.units and shape is not None and node.shape is not None:
                _compare(module, node, shape, fields, units, cutter.keep, whole_model=cutter.trace.scopes == ("",))
                compared += 1
    return compared


def _by_module(nodes: Sequence[Node]) -> dict[str, list[Node]]:
    out: dict[str, list[Node]] = {}
    for node in nodes:
        out.setdefault(node.module, []).append(node)
    return out


def _compare(
    module: str,
    node: Node,
    shape: tuple[int, ...],
    fields: Sequence[Field],
    units: Tensor,
    keep: Tensor,
    *,
    whole_model: bool,
) -> None:
    surviving: dict[int, Tensor] = {}
    for field_units in node.units:
        for d, k in surviving_along(field_units, keep).items():
            surviving[d] = k & surviving[d] if d in surviving else k
    expected = tuple(int(surviving[d].sum()) if d in surviving else n for d, n in enumerate(node.shape or ()))
    if not whole_model and len(shape) == len(expected):
        # how many rows a part is given may depend on values (a detector's regions): only axes of units have a size
        expected = tuple(expected[d] if d in surviving else n for d, n in enumerate(shape))
    if shape != expected:
        raise _difference(f"{node.op} returns {list(shape)}, where {list(expected)} survive", module)
    for field in fields:
        now = units[field.labels]
        same = [u for u in node.units if {d for d, n in enumerate(u.shape) if n > 1} >= field.dims]
        candidates = [_surviving(u, surviving) for u in same]
        # A field may stand for one of several of the original; it is wrong only if it agrees with none of them.
        candidates = [c for c in candidates if c.shape == now.shape]
        if candidates and not any(_agree(now, c) for c in candidates):
            raise _difference(f"{node.op} returns channels that are not those which survived, in their order", module)


def _surviving(units: Tensor, surviving: Mapping[int, Tensor]) -> Tensor:
    for d, k in surviving.items():
        if units.shape[d] > 1:
            units = units.index_select(d, k.nonzero().flatten())
    return units


def _agree(now: Tensor, was: Tensor) -> bool:
    # Positions that the original cannot cut, or that come from no tensor, are not comparable.
    both = (now >= 0) & (was > STAYS)
    return bool((now[both] == was[both]).all())


def _difference(what: str, module: str) -> SlimError:
    return SlimError(
        f"the slim model's graph differs from the masked model's in {module or 'its own forward'!r}: {what}. Exclude "
        "it (exclude_modules=[...]) and report it, please: this should not happen.",
        module=module,
    )
