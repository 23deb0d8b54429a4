"""Explains in a few sentences why channels can be removed or must stay."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..errors import CocktailError
from ..graph import Link, Stay
from ..utils.grouping import grouped
from ..utils.layer_names import few, folded, nearest, owner, short
from .findings import Findings, Layer

__all__ = ["Answer", "Why", "why"]

NAMED = 6
"""Of a long list so many names are told."""

TIES = {
    "add": "added to",
    "sub": "subtracted from",
    "mul": "multiplied with",
    "div": "divided by",
    "cat": "concatenated with",
    "stack": "stacked with",
    "where": "chosen in place of",
    "linear": "contracted with",
    "matmul": "contracted with",
    "bmm": "contracted with",
    "scaled_dot_product_attention": "attended together with",
}
"""How an op ties channels to others, in words."""

READS = ("linear", "addmm", "matmul", "bmm", "mm", "einsum", "convolution")
"""Ops (besides all that begin with ``conv``) whose weight's input columns are tied to the channels that they read."""


@dataclass(frozen=True)
class Answer:
    """The answer for one axis of a parameter.

    Attributes:
        tensor: The parameter or buffer.
        where: What the text speaks of: of a weight the module, else the tensor.
        side: ``"output channels"``, ``"input channels"`` or ``"entries"``.
        of: How many there are along the axis.
        groups: Channel groups with which they go.
        stay: What stays of them, and why; ``None`` where nothing does.
        text: The same in words.
    """

    tensor: str
    where: str
    side: str
    of: int
    groups: tuple[str, ...]
    stay: Stay | None
    text: str


@dataclass(frozen=True)
class Why:
    """Whether the channels of a module or parameter can go, and if not, why.

    Attributes:
        name: As asked.
        answers: One for each axis of each parameter asked for.
        notes: What holds besides: eligibility for single weights, what the model's graph hides.
    """

    name: str
    answers: tuple[Answer, ...]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        same = grouped((a.text, a.where) for a in self.answers)
        return "\n".join([*(f"{_subject(where)}: {text}" for text, where in same.items()), *self.notes])

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


def _subject(names: Sequence[str]) -> str:
    """``bn1 (weight, bias)`` for tensors of one module."""
    owners = {owner(n) for n in names}
    if len(names) > 1 and len(owners) == 1:
        return f"{owners.pop()} ({', '.join(n.rpartition('.')[2] for n in names)})"
    return ", ".join(folded(names))


def why(found: Findings, name: str) -> Why:
    """See :meth:`Inspection.why`."""
    layers = [la for la in found.layers if la.name == name or la.module == name]
    own = [t for t in found.tensors if t == name or owner(t) == name]
    if not own and not layers and name not in found.modules:
        names = [*found.modules, *found.tensors]
        raise CocktailError(
            f"{found.model} has no module or parameter {name!r}{nearest(name, names) or '.'} "
            "Names are those of named_modules() and named_parameters()."
        )
    if not found.followed:
        return Why(name, (), (f"{name}: nothing of it can go: {found.kept[0].reason}",))
    if not layers and not any(_known(found, t) for t in own):
        inside = [la for la in found.layers if la.name.startswith(f"{name}.")]
        if inside:
            answers = [a for la in inside for a in _of_layer(found, la)[:1] if a.stay is not None]
            return Why(name, tuple(answers), (_contents(name, inside),))
        what = "no value of it is used in the graph" if own else "it has no parameters"
        return Why(name, (), (f"{name}: {what}, so there is nothing of it to remove.",))
    answers = [a for la in layers for a in _of_layer(found, la)]
    weights = {la.name for la in found.layers}
    single = name in found.tensors
    for tensor in own:
        if tensor not in weights and (single or not layers):
            answers += _of_tensor(found, tensor)
    return Why(name, tuple(answers), tuple(n for la in layers for n in _notes(la)))


def _known(found: Findings, tensor: str) -> bool:
    touched = {s.tensor for g in found.groups for s in g.slices}
    return tensor in touched or any(s.tensor == tensor for s in found.stays)


def _of_layer(found: Findings, layer: Layer) -> list[Answer]:
    sides = (("output channels", "rows"), ("input channels", "columns"))
    return [
        _answer(found, layer.name, axis, side, kind, layer.module)
        for axis, (side, kind) in zip(layer.axes, sides, strict=True)
    ]


def _of_tensor(found: Findings, tensor: str) -> list[Answer]:
    shape = found.tensors[tensor]
    answers = [_answer(found, tensor, axis, "entries", "entries", owner(tensor)) for axis in range(len(shape))]
    return [a for a in answers if a.groups or a.stay is not None]


def _answer(found: Findings, tensor: str, axis: int, side: str, kind: str, module: str) -> Answer:
    of = found.tensors[tensor][axis]
    stay = next((s for s in found.stays if s.tensor == tensor and s.axis == axis), None)
    slices = [(g.name, s) for g in found.groups for s in g.slices if s.tensor == tensor and s.axes == (axis,)]
    groups = tuple(dict.fromkeys(g for g, _ in slices))
    if kind == "entries" and (any(s.kind == "rows" for _, s in slices) or (stay is not None and tensor in stay.makers)):
        kind, side = "rows", "output channels"  # an embedding
    where = short(tensor) if kind != "entries" else tensor
    what = side if kind != "entries" or len(found.tensors[tensor]) == 1 else f"positions along axis {axis}"
    if stay is not None and kind == "columns" and stay.module == module and not stay.chain and not stay.makers:
        text = (
            f"its {of} input channels stay: no weight makes what it reads, channel by channel (it is the input, say)."
        )
    else:
        text = _sentence(found, of, what, groups, stay)
    return Answer(tensor, where, side, of, groups, stay, text)


def _sentence(found: Findings, of: int, side: str, groups: Sequence[str], stay: Stay | None) -> str:
    goes = f"with the group{'s' if len(groups) > 1 else ''} {few(folded(groups), NAMED)}"
    if len(groups) == 1:
        group = next(g for g in found.groups if g.name == groups[0])
        goes += f" ({group.units} units; a unit is {group.unit})"
    if stay is None:
        return f"all {of} {side} can go, {goes}." if groups else f"its {of} {side} are tied to nothing that can go."
    cause = _cause(stay, side)
    if not groups and stay.positions == stay.of:
        return f"none of its {of} {side} can go: {cause}"
    some = f" Others can, {goes}." if groups else ""
    return f"{stay.positions} of its {of} {side} stay: {cause}{some}"


def _cause(stay: Stay, side: str) -> str:
    """One or two sentences: the chain, then its end, then what else is in it."""
    chain = _condensed(stay)
    if not chain:
        text = f"they are {stay.reason}" if stay.reason.startswith("an output") else stay.reason
    else:
        first = chain[0]
        text = f"they are {_tie(first, side)} {short(first.tensor)} (in {first.module or 'the model'})"
        if len(chain) > 2:
            text += f", and so on through {len(chain) - 2} more to those of {short(chain[-1].tensor)}"
        elif len(chain) == 2:
            last = chain[1]
            text += f", which are {_tie(last, side)} {short(last.tensor)} (in {last.module or 'the model'})"
        end = f"are {stay.reason}" if stay.reason.startswith("an output") else f"stay: {stay.reason}"
        text += f", which {end}"
    others = [m for m in stay.makers if m != stay.tensor]
    tail = ""
    if others:
        names = few(folded(short(m) for m in others), NAMED)
        tail = f" The same channels are made by {len(others)} other weight{'s' if len(others) > 1 else ''}: {names}."
    return f"{text}.{tail}"


def _condensed(stay: Stay) -> list[Link]:
    """The chain without steps from a layer's own tensors to one another."""
    out: list[Link] = []
    at = owner(stay.tensor)
    for link in stay.chain:
        if not link.tensor or owner(link.tensor) == at:
            continue
        at = owner(link.tensor)
        out.append(link)
    return out


def _tie(link: Link, side: str) -> str:
    if side == "input channels" and (link.op in READS or link.op.startswith("conv")):
        return "those of"
    if link.op.startswith("conv"):
        return "made one for one from those of"  # depthwise
    if link.op.endswith("norm"):
        return "normalised with those of"
    return f"{TIES.get(link.op, f'tied by {link.op} to')} those of"


def _notes(layer: Layer) -> list[str]:
    out = []
    if not layer.unstructured.eligible:
        out.append(f"{short(layer.name)}: no single weights go (unstructured, N:M): {layer.unstructured.reason}.")
    elif not layer.nm.eligible:
        out.append(f"{short(layer.name)}: no N:M: {layer.nm.reason}.")
    return out


def _contents(name: str, inside: Sequence[Layer]) -> str:
    unprunable = [short(la.name) for la in inside if not la.groups]
    groups = dict.fromkeys(g for la in inside for g in la.groups)
    text = f"{name}: the output channels of its weights ({len(inside)}) "
    text += f"go with the groups {few(folded(groups), NAMED)}" if groups else "stay"
    rest = f"; those of {few(folded(unprunable), NAMED)} stay" if unprunable and groups else ""
    return f"{text}{rest}."
