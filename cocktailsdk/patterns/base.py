"""What a pattern is: a family of masks, made by unified mask generation (UMG).

A pattern names its subnetworks, says in which round each is made, and makes one mask
at a time from weight magnitudes. It knows nothing of training, files or devices.
"""

from __future__ import annotations

import itertools
import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Self

from jaxtyping import Float64
from torch import Tensor

from ..errors import PatternError
from ..graph import Coupling, Weight
from ..masks import Mask
from .scores.base import Comparison

DENSE = "dense"

MOST_LEVELS = 1000
"""Of one pattern, where it chooses their sparsities: more would share their names."""

WARN_BEYOND = 0.05
"""Difference from the sparsity asked for from which on a user's pattern is warned about."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Subnet:
    """One network of the bundle.

    Attributes:
        name: What users type: ``"dense"``, ``"unstructured@0.488"``, ``"2:4"``, ``"channel@0.271"``.
        pattern: The registered name of its pattern (``"dense"`` for the dense network).
        sparsity: The sparsity asked for, in [0, 1].
        options: What else the pattern needs to make it (``{"n": 2, "m": 4}``), as JSON values.
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
        values: Current values by name, detached, of all weights and all channel producers. Where a weight is
            computed from a parameter element by element (weight norm, ``torch.nn.utils.prune``, fake quantization),
            the computed weight, since that is what the model multiplies with.
        previous: This pattern's own mask of the level before, for nested patterns.
        made: Masks of the current round by other patterns, by pattern name.
        hidden: Only for :meth:`Pattern.check`: by weight name, elements that another mask zeroes besides. A mask is
            False there, whatever the pattern chose.
        scores: By weight name, scores of elements, of the weights' shapes and not negative. ``None`` where magnitudes
            are the scores.
        comparison: Within what elements are compared: ``"global"``, ``"layer"`` (a weight), ``"row"`` (an output).
        unit_scores: A score for each channel unit, where the score gives them by itself.
        layer_scores: A score for each residual branch by its name, and for each layer by its path, likewise.
        expert_scores: By the name of a set of experts, a score for each of them, likewise.
    """

    coupling: Coupling
    eligible: tuple[Weight, ...]
    values: Mapping[str, Tensor]
    previous: Mask | None = None
    made: Mapping[str, Mask] = field(default_factory=dict)
    hidden: Mapping[str, Tensor] = field(default_factory=dict)
    scores: Mapping[str, Tensor] | None = None
    comparison: Comparison = "global"
    unit_scores: Float64[Tensor, " units"] | None = None
    layer_scores: Mapping[str, float] | None = None
    expert_scores: Mapping[str, Float64[Tensor, " experts"]] | None = None

    @property
    def ranked(self) -> Mapping[str, Tensor]:
        """What patterns rank by magnitude: scores where there are some, otherwise the weights."""
        return self.values if self.scores is None else self.scores


class Pattern(ABC):
    """Base class of all patterns.

    Attributes:
        name: Its registered name, set by :func:`register_pattern`.
        after: Names of patterns whose masks of the same round it wants to see in ``UMG.made``; a name stands for all
            patterns of that ``term``, too.
        nested: Whether each subnet's zeros contain those of the one before.
        term: The term of the channel score that its masks enter: ``"unstructured"`` (weights chosen freely, weight β),
            ``"n:m"`` (so many of each run, 1-β), or none.
        removes_units: Whether it removes units, and masks no elements; such a pattern can be the first of a product.
        ranks: What it ranks: single ``"elements"`` (also within runs and blocks), channel ``"units"``, ``"layers"`` and
            branches, or ``"experts"``.
    """

    name: ClassVar[str] = ""
    after: ClassVar[tuple[str, ...]] = ()
    nested: ClassVar[bool] = True
    term: ClassVar[str] = ""
    removes_units: ClassVar[bool] = False
    ranks: ClassVar[Literal["elements", "units", "layers", "experts"]] = "elements"

    @abstractmethod
    def subnets(self) -> tuple[Subnet, ...]:
        """Its subnetworks, in the order they are made."""

    @abstractmethod
    def mask(self, subnet: Subnet, umg: UMG) -> Mask:
        """The subnet's mask, from the weights as they are."""

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """Keyword arguments that make an equal pattern, as JSON values.

        Bundles keep it. An argument that is added later must be left out where it has the value that patterns had
        before, so that bundles of before stay as they are; where that is not the default, override
        :meth:`from_config`.
        """

    def config_on(self, coupling: Coupling) -> dict[str, Any]:
        """:meth:`config` without what makes no difference on a model: runs resume where this is the same."""
        del coupling
        return self.config()

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """The pattern that :meth:`config` came from, of this version or an earlier one."""
        return cls(**config)

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

    def droppable(self, coupling: Coupling, eligible: Sequence[Weight]) -> Mapping[str, tuple[str, ...]]:
        """By name, the layers or branches that may go, each as its parameters; in order of execution.

        Nothing for patterns that rank no layers.

        Args:
            coupling: The model's coupling.
            eligible: The weights that patterns of elements may touch.
        """
        del coupling, eligible
        return {}

    def exact_sparsity(self, subnet: Subnet, mask: Mask, umg: UMG) -> float:
        """The sparsity that the mask has, by the same definition as ``Subnet.sparsity``."""
        del subnet
        total = sum(w.numel for w in umg.eligible)
        nonzero = sum(int(mask.elements[w.name].sum()) if w.name in mask.elements else w.numel for w in umg.eligible)
        return 1.0 - nonzero / total if total else 0.0

    def check(self, subnet: Subnet, mask: Mask, umg: UMG) -> None:
        """See that a mask is one that this pattern makes. Bundles are checked when they are saved and when they load.

        The patterns of this package count exactly. By default a mask whose :meth:`exact_sparsity` is not about
        ``subnet.sparsity`` is warned about, since only the pattern knows how it rounds: override this to refuse.

        Args:
            subnet: The subnetwork.
            mask: Its mask.
            umg: ``values`` are the dense weights; ``previous`` and ``made`` are not known.

        Raises:
            PatternError: The mask is another's.
        """
        exact = self.exact_sparsity(subnet, mask, umg)
        if not abs(exact - subnet.sparsity) <= WARN_BEYOND:
            log.warning(
                "the mask of %r has a sparsity of %.3f, and its pattern asks for %.3f",
                subnet.name,
                exact,
                subnet.sparsity,
            )

    def coverage(self, subnet: Subnet, mask: Mask, umg: UMG) -> float:
        """The share of the eligible weights that the pattern can touch at all (1 unless it leaves remainders)."""
        del subnet, mask, umg
        return 1.0

    @classmethod
    def parse(cls, spec: str) -> Self | None:
        """The pattern that a string stands for, or ``None`` where the string is not about this pattern.

        By default ``"name"`` is ``cls()`` and ``"name@0.5"`` is ``cls(sparsities=[0.5])``.

        Raises:
            PatternError: The string names this pattern but the rest makes no sense.
        """
        if spec.partition("@")[0].strip() != cls.name or "+" in spec:
            return None
        arguments: dict[str, Any] = level_of(spec)
        try:
            return cls(**arguments)
        except TypeError as e:
            raise PatternError(
                f"pattern {spec!r}: {cls.__name__} takes no 'sparsities'; give the object instead ({e})"
            ) from None

    def alone(self, name: str) -> Self | None:
        """The same pattern with one of its subnets alone; ``None`` where it cannot be made from :meth:`config`.

        By default for patterns with ``sparsities``, of exactly the sparsity that the subnet has: its name has three
        decimals of it.
        """
        sparsity = next(s.sparsity for s in self.subnets() if s.name == name)
        arguments = {k: v for k, v in self.config().items() if k not in ("rounds", "rate")}
        if "sparsities" not in arguments and len(arguments) == len(self.config()):
            return None
        return self.from_config({**arguments, "sparsities": [sparsity]})

    def merged(self, other: Self) -> Self:
        """One pattern with the subnets of both; called when a pattern is given twice (``"1:2", "2:4"``).

        By default patterns that differ in nothing but ``sparsities`` merge.

        Raises:
            PatternError: The two cannot be one.
        """
        a, b = self.config(), other.config()
        mine, theirs = a.pop("sparsities", None), b.pop("sparsities", None)
        if a != b or mine is None or theirs is None:
            raise PatternError(
                f"pattern {self.name!r} is given twice, as {self!r} and {other!r}; give one that has all its subnets"
            )
        a["sparsities"] = sorted({*mine, *theirs})
        return self.from_config(a)

    def __repr__(self) -> str:
        arguments = ", ".join(f"{k}={v!r}" for k, v in self.config().items())
        return f"{type(self).__name__}({arguments})"

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self.config() == other.config()

    __hash__ = None  # type: ignore[assignment]


def level_of(spec: str) -> dict[str, Any]:
    """What the part of a spec string after ``@`` says, as arguments: ``{"sparsities": [0.5]}``, or nothing without it.

    Raises:
        PatternError: It is no number.
    """
    name, at, argument = spec.partition("@")
    if not at:
        return {}
    try:
        return {"sparsities": [float(argument)]}
    except ValueError:
        raise PatternError(
            f"pattern {spec!r}: {argument!r} is not a number; write it like '{name.strip()}@0.5'"
        ) from None


def level_name(pattern: str, sparsity: float) -> str:
    """``"channel@0.271"``: three decimals, trailing zeros stripped; more only where three would read 0 or 1."""
    digits = 3
    while digits < 12 and 0 < sparsity < 1 and round(sparsity, digits) in (0.0, 1.0):
        digits += 1
    text = f"{sparsity:.{digits}f}".rstrip("0").rstrip(".")
    return f"{pattern}@{text}"


def geometric_sparsities(rounds: int, rate: float) -> tuple[float, ...]:
    """``1 - (1 - rate)^k`` for k = 1 … rounds (paper, Section 3.2), without the last digits' rounding noise."""
    return tuple(round(1.0 - (1.0 - rate) ** k, 12) for k in range(1, rounds + 1))


def checked_sparsities(
    pattern: str, sparsities: object, rounds: int, rate: float
) -> tuple[tuple[float, ...], tuple[Subnet, ...], dict[str, Any]]:
    """The sparsities of a nested pattern, ascending, its subnets, and the part of its configuration that makes them.

    Raises:
        PatternError: Not numbers in [0, 1], none, not ascending, or two that would have one name.
    """
    if sparsities is None:
        if isinstance(rounds, bool) or not isinstance(rounds, int) or not 1 <= rounds <= MOST_LEVELS:
            raise PatternError(f"{pattern}: rounds must be a whole number in 1 … {MOST_LEVELS}, not {rounds!r}")
        if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0.0 < rate < 1.0:
            raise PatternError(f"{pattern}: rate must be a number between 0 and 1, not {rate!r}")
        values = geometric_sparsities(rounds, rate)
        config: dict[str, Any] = {"rounds": rounds, "rate": rate}
    else:
        try:
            sequence = [sparsities] if isinstance(sparsities, int | float) else list(sparsities)  # type: ignore[call-overload]
            values = tuple(float(s) for s in sequence)
        except (TypeError, ValueError):
            raise PatternError(f"{pattern}: sparsities must be numbers in [0, 1], not {sparsities!r}") from None
        if not values:
            raise PatternError(f"{pattern}: sparsities is empty; give at least one number in [0, 1]")
        for s in values:
            if not 0.0 <= s <= 1.0:  # also refuses NaN
                raise PatternError(f"{pattern}: sparsity {s} is not in [0, 1]")
        if sorted(values) != list(values):
            raise PatternError(
                f"{pattern}: sparsities must ascend, since each mask contains the one before; found {list(values)}"
            )
        config = {"sparsities": list(values)}
    subnets = tuple(Subnet(level_name(pattern, s), pattern, s) for s in values)
    for a, b in itertools.pairwise(subnets):
        if a.name == b.name:
            raise PatternError(f"{pattern}: sparsities {a.sparsity} and {b.sparsity} would both be named {a.name!r}")
    return values, subnets, config
