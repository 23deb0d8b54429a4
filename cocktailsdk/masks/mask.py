"""A subnetwork's mask: bits for elements, one flag a unit for channels."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass, field, replace

from jaxtyping import Bool
from torch import Tensor

from ..graph import Branch, Coupling


@dataclass(frozen=True)
class Mask:
    """Which weights a subnetwork keeps.

    A pattern fills either part or both (a product of patterns, channel then 2:4, say).

    Attributes:
        elements: By weight name, True where an element is kept, in the weight's shape.
        removed: For each channel unit whether it is removed; ``None`` where the pattern removes none.
        experts: By the name of a set of experts (``ExpertSet.name``), for each of them whether it is removed. While the
            subnetwork is active, no token is given to one: the router's logit is -inf there.
    """

    elements: Mapping[str, Bool[Tensor, "..."]] = field(default_factory=dict)
    removed: Bool[Tensor, " units"] | None = None
    experts: Mapping[str, Bool[Tensor, " experts"]] = field(default_factory=dict)

    def tensors(self, coupling: Coupling) -> dict[str, Bool[Tensor, "..."]]:
        """All that is set to zero: by parameter or buffer name, True where kept, broadcastable to its shape."""
        return coupling.spared(self.left(coupling))

    def of(self, coupling: Coupling, names: Container[str]) -> dict[str, Bool[Tensor, "..."]]:
        """:meth:`tensors` of some parameters or buffers, without the work on all others."""
        # The mask of a scale follows from that of the weight that it scales.
        wanted = {n for n in {*self.elements, *coupling.fields} if n in names}
        wanted |= {weight for weight, scale in coupling.scales.items() if scale.name in names}
        part = Mask({n: self.elements[n] for n in self.elements if n in wanted}, self.removed, self.experts)
        narrowed = replace(coupling, fields={n: f for n, f in coupling.fields.items() if n in wanted})
        return {n: keep for n, keep in part.tensors(narrowed).items() if n in names}

    def left(self, coupling: Coupling) -> dict[str, Bool[Tensor, "..."]]:
        """What is left, for counting: the same but for parameters that are divided by a norm of their own."""
        out = dict(self.elements)
        if self.removed is not None:
            for name, keep in coupling.left(self.removed).items():
                out[name] = out[name] & keep if name in out else keep
        for name, keep in coupling.left_by_experts(self.experts).items():
            out[name] = out[name] & keep if name in out else keep
        return out

    def dropped(self, coupling: Coupling) -> tuple[Branch, ...]:
        """The residual branches that are masked as a whole."""
        gone = {name for name, keep in self.elements.items() if not bool(keep.any())}
        return tuple(b for b in coupling.branches if gone.issuperset(b.tensors)) if gone else ()
