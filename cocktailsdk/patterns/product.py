"""Products of patterns: channels or heads go first, then single weights of what is left."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor

from ..errors import PatternError
from ..graph import Coupling, Weight
from ..masks import Mask
from ..masks.remaining import Remaining
from .base import MOST_LEVELS, UMG, Pattern, Subnet
from .checking import refuse
from .registry import make_pattern, parse_pattern, register_pattern, resolve_patterns

Factor = str | Pattern | Mapping[str, Any]
"""A pattern, its spec string, or its registered name and configuration (``{"name": …, "config": …}``)."""

SIGN = "+"


@register_pattern("product")
class Product(Pattern):
    """One pattern after another: the first removes units, the second masks weights of what they leave.

    The second sees the weights as the slim model will hold them: 2:4 after channels counts its runs along the input
    channels that are left, so that the slim model is truly 2:4, and whatever it counts, remainders and coverage
    included, it counts there. Every level of the first goes with every level of the second. The first is nested over
    its levels; the second is chosen anew.

    A product's sparsity is ``1 - (1 - s₁)(1 - s₂)``, each factor's by its own definition.

    Args:
        pairs: Which patterns: ``[("channel@0.5", "2:4")]``; each a spec string, an object, or its configuration.

    Raises:
        PatternError: A factor is not known, or the two do not go together.
    """

    after = ("unstructured", "n:m")

    def __init__(self, pairs: Sequence[Sequence[Factor]]) -> None:
        if isinstance(pairs, str) or not isinstance(pairs, Sequence) or not pairs:
            raise PatternError(f"product takes pairs of patterns, as in [('channel@0.5', '2:4')], not {pairs!r}")
        self._parts: dict[str, tuple[Pattern, Subnet, Pattern, Subnet]] = {}
        made: list[tuple[Pattern, Pattern]] = []
        levels: list[Subnet] = []
        for pair in pairs:  # counted while they are made: a short file may name many pairs of many levels
            first, second = _checked(pair)
            made.append((first, second))
            if len(levels) + len(first.subnets()) * len(second.subnets()) > MOST_LEVELS:
                raise PatternError(f"product: more than {MOST_LEVELS} pairs of levels; give fewer of each pattern")
            for a in first.subnets():
                for b in second.subnets():
                    sparsity = 1.0 - (1.0 - a.sparsity) * (1.0 - b.sparsity)
                    name = f"{a.name}{SIGN}{b.name}"
                    self._parts[name] = first, a, second, b
                    levels.append(Subnet(name, self.name, sparsity, b.options))
        self.pairs = tuple(made)
        self._subnets = tuple(levels)

    def subnets(self) -> tuple[Subnet, ...]:
        """Its subnetworks, named like ``"channel@0.5+2:4"``: pair by pair, by levels of the first, then the second."""
        return self._subnets

    def mask(self, subnet: Subnet, umg: UMG) -> Mask:
        """Units by the first pattern, then elements by the second on the weights that are left."""
        first, a, second, b = self._parts[subnet.name]
        before = self._before(subnet) if umg.previous is not None else None
        if before is not None and umg.previous is not None and before.name == a.name:
            removed = umg.previous.removed  # the same level of the first, with another of the second
        else:
            known = Mask(removed=umg.previous.removed) if before is not None and umg.previous is not None else None
            removed = first.mask(a, replace(umg, previous=known if first.nested else None)).removed
        if removed is None:
            raise PatternError(f"product {subnet.name!r}: {first!r} removes no units")
        remaining = Remaining(umg.coupling, removed)
        made = second.mask(b, _seen(remaining, umg))
        if made.removed is not None:
            raise PatternError(f"product {subnet.name!r}: {second!r} removes units, which only the first may do")
        if made.experts:
            raise PatternError(f"product {subnet.name!r}: {second!r} removes experts, which no factor of a product may")
        weights = {w.name: w for w in umg.eligible}
        other = next((n for n in made.elements if n not in weights), None)
        if other is not None:
            raise PatternError(f"product {subnet.name!r}: {second!r} masks {other!r}, which is no eligible weight")
        return Mask({n: remaining.spread(weights[n], k) for n, k in made.elements.items()}, removed)

    def _before(self, subnet: Subnet) -> Subnet | None:
        """The first factor's level in the subnet before, where that is of the same pair."""
        names = list(self._parts)
        i = names.index(subnet.name)
        if i == 0 or self._parts[names[i - 1]][0] is not self._parts[subnet.name][0]:
            return None
        return self._parts[names[i - 1]][1]

    def exact_sparsity(self, subnet: Subnet, mask: Mask, umg: UMG) -> float:
        """``1 - (1 - s₁)(1 - s₂)`` of what the factors count in their parts of the mask."""
        first, a, second, b = self._parts[subnet.name]
        remaining, inner = _inner(mask, umg)
        one = first.exact_sparsity(a, Mask(removed=mask.removed), umg)
        return 1.0 - (1.0 - one) * (1.0 - second.exact_sparsity(b, inner, _seen(remaining, umg)))

    def check(self, subnet: Subnet, mask: Mask, umg: UMG) -> None:
        """Each factor checks its part of the mask, the second on the weights that the first leaves.

        Raises:
            PatternError: One of them refuses it.
        """
        first, a, second, b = self._parts[subnet.name]
        weights = {w.name: w for w in umg.eligible}
        odd = set(mask.elements) - weights.keys()
        if mask.removed is None or odd:
            refuse(subnet, f"{min(odd)!r} is masked, which is no eligible weight" if odd else "it removes no units")
        remaining, inner = _inner(mask, umg)
        for n, element_mask in inner.elements.items():
            if not torch.equal(remaining.spread(weights[n], element_mask), mask.elements[n]):
                refuse(subnet, f"elements of {n!r} are kept that the removed units take")
        # Where no slice can hold what units leave, the weight is whole, and what they take is masked besides.
        hidden = {n: h for n, w in weights.items() if n in mask.elements and (h := remaining.hidden(w)) is not None}
        for pattern, own, factor, seen in (
            (first, a, Mask(removed=mask.removed), umg),
            (second, b, inner, replace(_seen(remaining, umg), hidden=hidden)),
        ):
            try:
                pattern.check(own, factor, seen)
            except PatternError as error:
                refuse(subnet, str(error))

    def coverage(self, subnet: Subnet, mask: Mask, umg: UMG) -> float:
        """The share of the weights left by the first that the second can touch at all."""
        _, _, second, b = self._parts[subnet.name]
        remaining, inner = _inner(mask, umg)
        return second.coverage(b, inner, _seen(remaining, umg))

    def config(self) -> dict[str, Any]:
        """Keyword arguments that make an equal pattern."""
        return {"pairs": [[{"name": p.name, "config": p.config()} for p in pair] for pair in self.pairs]}

    def config_on(self, coupling: Coupling) -> dict[str, Any]:
        """:meth:`config` with that of each factor on the model."""
        return {"pairs": [[{"name": p.name, "config": p.config_on(coupling)} for p in pair] for pair in self.pairs]}

    @classmethod
    def parse(cls, spec: str) -> Self | None:
        """``"channel@0.5+2:4"``; each side as it is written alone."""
        factors = [part.strip() for part in spec.split(SIGN)]
        if len(factors) == 1:
            return None
        if len(factors) != 2:
            raise PatternError(f"pattern {spec!r}: a product has two factors, as in 'channel@0.5{SIGN}2:4'")
        return cls([factors])

    def alone(self, name: str) -> Self | None:
        """One level of the first pattern with one of the second."""
        first, a, second, b = self._parts[name]
        one, two = first.alone(a.name), second.alone(b.name)
        return None if one is None or two is None else type(self)([(one, two)])

    def merged(self, other: Self) -> Self:
        """The pairs of both; levels of one pattern before the same second become one pair."""
        pairs = [(first, second) for first, second in self.pairs]
        for first, second in other.pairs:
            for i, (have, by) in enumerate(pairs):
                if have == first and type(by) is type(second):
                    pairs[i] = have, by if by == second else by.merged(second)
                    break
                if by == second and type(have) is type(first):
                    pairs[i] = have.merged(first), by
                    break
            else:
                pairs.append((first, second))
        return type(self)(pairs)


def _inner(mask: Mask, umg: UMG) -> tuple[Remaining, Mask]:
    """What a mask's removed units leave, and the second pattern's part of the mask, as that pattern sees it."""
    assert mask.removed is not None
    remaining = Remaining(umg.coupling, mask.removed)
    weights = {w.name: w for w in umg.eligible}
    return remaining, Mask({n: remaining.slice(weights[n], k) for n, k in mask.elements.items()})


def _seen(remaining: Remaining, umg: UMG) -> UMG:
    """What the second pattern sees: eligible weights and their values as the slim model will hold them."""
    weights = {w.name: w for w in umg.eligible}
    scores = None if umg.scores is None else _Sliced(remaining, weights, umg.scores)
    return UMG(
        umg.coupling,
        tuple(remaining.weight(w) for w in umg.eligible),
        _Sliced(remaining, weights, umg.values),
        scores=scores,
        comparison=umg.comparison,
    )


class _Sliced(Mapping[str, Tensor]):
    """What is left of weights' values, sliced when it is asked for: counting masks needs no values."""

    def __init__(self, remaining: Remaining, weights: Mapping[str, Weight], values: Mapping[str, Tensor]) -> None:
        self._remaining, self._weights, self._values = remaining, weights, values

    def __getitem__(self, name: str) -> Tensor:
        return self._remaining.slice(self._weights[name], self._values[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


def _checked(pair: Sequence[Factor]) -> tuple[Pattern, Pattern]:
    if isinstance(pair, str) or not isinstance(pair, Sequence) or len(pair) != 2:
        raise PatternError(f"a product has two factors, as in ('channel@0.5', '2:4'), not {pair!r}")
    first, second = (_pattern(factor) for factor in pair)
    if not first.removes_units:
        raise PatternError(
            f"the first factor of a product removes units (channel, heads), and {first.name!r} does not; "
            f"write it after one that does, as in 'channel@0.5{SIGN}2:4'"
        )
    if second.removes_units or isinstance(second, Product):
        raise PatternError(f"the second factor of a product masks single weights; {second.name!r} removes units")
    return first, second


def _pattern(factor: Factor) -> Pattern:
    if isinstance(factor, Mapping):
        return make_pattern(factor["name"], factor["config"])
    return resolve_patterns(parse_pattern(factor) if isinstance(factor, str) else (factor,))[0]
