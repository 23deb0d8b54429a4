"""Which whole layers of a model can go: elements of its lists of blocks that do nothing but add to the stream."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from ..graph import Branch, Coupling, Weight
from ..masks import Mask
from .depth import removable_branches
from .unit_groups import attention_branches

__all__ = ["WholeLayer", "dropped_layers", "elements_around", "layers_of", "removable_layers"]


@dataclass(frozen=True)
class WholeLayer:
    """An element of a ``ModuleList`` or ``Sequential`` whose parameters all belong to its residual branches.

    Attributes:
        path: The element's path (``"model.layers.3"``).
        branches: Its residual branches. With all of them masked it hands its input on, or what a ReLU leaves of it.
    """

    path: str
    branches: tuple[Branch, ...]

    @property
    def tensors(self) -> tuple[str, ...]:
        """The parameters of its branches."""
        return tuple(t for b in self.branches for t in b.tensors)


def removable_layers(coupling: Coupling, eligible: Sequence[Weight]) -> tuple[WholeLayer, ...]:
    """The layers that may go: those of eligible weights alone."""
    names = {b.name for b in removable_branches(coupling, eligible)}
    return tuple(layer for layer in layers_of(coupling) if names.issuperset(b.name for b in layer.branches))


def dropped_layers(mask: Mask | None, coupling: Coupling, layers: Sequence[WholeLayer]) -> list[WholeLayer]:
    """The layers of which a mask drops every branch."""
    names = {b.name for b in mask.dropped(coupling)} if mask is not None else set[str]()
    return [layer for layer in layers if names.issuperset(b.name for b in layer.branches)]


def layers_of(coupling: Coupling) -> tuple[WholeLayer, ...]:
    """Every whole layer, in order of execution.

    Lists are nested in some models. Of the elements around a branch the innermost counts that has an attention and
    other branches, such as an MLP; where none has both, the innermost of all.
    """
    attention = {b.name for b in attention_branches(coupling)}
    owned = {t: b for b in coupling.branches for t in b.tensors}
    elements: dict[str, dict[str, Branch] | None] = {}
    for name in coupling.shapes:
        for path in elements_around(name):
            branch = owned.get(name)
            of = elements.setdefault(path, {})
            if branch is None or not all(t.startswith(f"{path}.") for t in branch.tensors):
                elements[path] = None  # a parameter of the stream's own, or of a branch that leads out of the element
            elif of is not None:
                of[branch.name] = branch
    whole = {path: of for path, of in elements.items() if of}
    chosen: dict[str, str] = {}
    for branch in coupling.branches:
        around = [path for path, of in whole.items() if branch.name in of]
        around.sort(key=len, reverse=True)
        blocks = [path for path in around if 0 < len(attention & whole[path].keys()) < len(whole[path])]
        if around:
            chosen[branch.name] = (blocks or around)[0]
    paths = set(chosen.values())
    # of a stage whose other blocks are layers, an element without attention is one by itself
    outer = {path for path in paths if any(other.startswith(f"{path}.") for other in paths)}
    out: dict[str, list[Branch]] = {}
    for branch in coupling.branches:
        around = [path for path, of in whole.items() if branch.name in of and path not in outer]
        best = chosen.get(branch.name)
        if best in outer:
            best = max(around, key=len, default=None)
        if best is not None:
            out.setdefault(best, []).append(branch)
    # a part of a block whose other part is tied to other blocks is no layer beside blocks that are whole
    shapes = {_shape(path) for path in out}
    parts = {path for path in out if any(_shape(path).startswith(f"{shape}.") for shape in shapes)}
    return tuple(WholeLayer(path, tuple(branches)) for path, branches in out.items() if path not in parts)


def _shape(path: str) -> str:
    """A path with its numbers left out: that of ``"block.3.layer.1"`` begins with that of ``"block.0"``."""
    return re.sub(r"\d+", "#", path)


def elements_around(name: str) -> list[str]:
    """Paths around a parameter that end in a number, as elements of lists do."""
    parts = name.split(".")[:-1]
    return [".".join(parts[: i + 1]) for i, part in enumerate(parts) if part.isdecimal()]
