"""What a pattern is: a family of masks, made by unified mask generation (UMG).

A pattern names its subnetworks, says in which round each is made, and makes one mask
at a time from weight magnitudes. It knows nothing of training, files or devices.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from ..graph import Coupling, Weight
from ..masks import Mask

DENSE = "dense"


@dataclass(frozen=True)
class Subnet:
    """One network of the bundle.

    Attributes:
        name: What users type: ``"dense"``, ``"unstructured@0.488"``, ``"2:4"``, ``"channel@0.271"``.
        pattern: The registered name of its pattern (``"dense"`` for the dense network).
        sparsity: The sparsity asked for, in [0, 1].
        options: What else the pattern needs to make it (``{"n": 2, "m": 4}``).
    """

    name: str
    pattern: str
    sparsity: float
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class UMG:
    """What a pattern sees when it makes a mask (method: unified mask generation).

    Attributes:
        coupling: The model's weights, units and groups.
        eligible: The weights that elementwise patterns may touch, in order of execution.
        values: Current values by name, detached, of all eligible weights and all channel producers.
        previous: This pattern's own mask of the level before, for nested patterns.
        made: Masks of the current round by other patterns, by pattern name.
    """

    coupling: Coupling
    eligible: tuple[Weight, ...]
    values: Mapping[str, Tensor]
    previous: Mask | None = None
    made: Mapping[str, Mask] = field(default_factory=dict)


class Pattern(ABC):
    """Base class of all patterns.

    Attributes:
        name: Its registered name, set by :func:`register_pattern`.
        after: Names of patterns whose masks of the same round it wants to see in ``UMG.made``.
        nested: Whether each subnet's zeros contain those of the one before.
    """

    name: ClassVar[str] = ""
    after: ClassVar[tuple[str, ...]] = ()
    nested: ClassVar[bool] = True

    @abstractmethod
    def subnets(self) -> tuple[Subnet, ...]:
        """Its subnetworks, in the order they are made."""

    @abstractmethod
    def mask(self, subnet: Subnet, umg: UMG) -> Mask:
        """The subnet's mask, from the weights as they are."""

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """Keyword arguments that make an equal pattern, as JSON values."""

    def rounds(self, total: int) -> tuple[tuple[Subnet, ...], ...]:
        """Which subnets train in each of the rounds ``1 … total``; the last of a round is the one that enters UMG.

        By default level ``j`` of ``L`` is made in round ``ceil(j * total / L)``; until the next level is made it
        goes on training.
        """
        levels = self.subnets()
        out: list[tuple[Subnet, ...]] = []
        done = 0
        for k in range(1, total + 1):
            level = k * len(levels) // total
            out.append(levels[done:level] or levels[max(level - 1, 0) : level])
            done = max(done, level)
        return tuple(out)

    def exact_sparsity(self, subnet: Subnet, mask: Mask, umg: UMG) -> float:
        """The sparsity that the mask has, by the same definition as ``Subnet.sparsity``."""
        del subnet
        total = sum(w.numel for w in umg.eligible)
        kept = sum(int(mask.elements[w.name].sum()) if w.name in mask.elements else w.numel for w in umg.eligible)
        return 1.0 - kept / total if total else 0.0


