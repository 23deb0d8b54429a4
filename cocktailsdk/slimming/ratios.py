"""What share of which units goes: a ratio for all, or ratios by module and group."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from torch import nn

from ..errors import PatternError
from ..graph import Coupling, Group
from ..net.target_modules import containers_of, is_called, nearest, owner_of, some_of
from ..patterns.unit_choice import Pool, pooled

__all__ = ["Ratios", "checked_ratios", "pools"]

REST = "*"
"""The key of a mapping that stands for all that no other key claims."""

Rank = tuple[int, ...]
"""How specific a claim is; of two, the greater wins."""

_GROUP, _PATH, _SUFFIX, _CONTAINER, _EXPRESSION, _REST = 5, 4, 3, 2, 1, 0


def checked_ratios(ratio: object) -> float | dict[str, float]:
    """A number in [0, 1), or a mapping to such numbers.

    Raises:
        PatternError: It is neither.
    """
    if not isinstance(ratio, Mapping):
        return _checked("ratio", ratio)
    if not ratio:
        raise PatternError('ratio is an empty mapping: name modules or groups, or "*" for all of them')
    for key in ratio:
        if not isinstance(key, str) or not key:
            raise PatternError(
                f'ratio: the keys are names of modules and groups, regular expressions or "*" for the rest, not {key!r}'
            )
    return {key: _checked(f"ratio of {key!r}", value) for key, value in ratio.items()}


def _checked(what: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 <= value < 1.0:
        raise PatternError(f"{what} must be a number in [0, 1), not {value!r}")
    return float(value)


class Ratios:
    """A mapping's keys, looked up in a model.

    Args:
        model: The model.
        by_key: The mapping.
        groups: Names of channel groups, which are keys too.

    Raises:
        PatternError: A key is no name in the model and no regular expression that matches one.
    """

    def __init__(self, model: nn.Module, by_key: Mapping[str, float], groups: Iterable[str] = ()) -> None:
        self.by_key = dict(by_key)
        self._groups = set(groups)
        parameters = list(model.named_parameters(remove_duplicate=False))
        paths = [p for p, _ in model.named_modules(remove_duplicate=False) if p]
        names = [*paths, *(n for n, _ in parameters)]
        first: dict[int, str] = {}
        self._aliases: dict[str, list[str]] = {}
        for name, p in parameters:
            self._aliases.setdefault(first.setdefault(id(p), name), []).append(name)
        self._expressions: dict[str, re.Pattern[str]] = {}
        for key in self.by_key:
            if key in (REST, *self._groups) or any(is_called(key, n) for n in names):
                continue
            try:
                expression = re.compile(key)
            except re.error as e:
                problem = f"nor a regular expression ({e})"
            else:
                if any(expression.fullmatch(n) for n in names):
                    self._expressions[key] = expression
                    continue
                problem = "nor does it match a whole path as a regular expression"
            raise PatternError(
                f"ratio: nothing in the model is called {key!r}, {problem}{nearest(key, [*paths, *self._groups])}; "
                f"modules are {some_of(paths)}"
            )

    def of_weight(self, name: str) -> str | None:
        """The key that claims a parameter by itself, whatever else makes the same channels.

        Raises:
            PatternError: Two keys do, with different ratios, and neither is more specific.
        """
        ranks = {key: self._rank(key, name) for key in self.by_key}
        return self._most_specific(repr(name), {key: rank for key, rank in ranks.items() if rank is not None})

    def of_group(self, group: Group) -> str | None:
        """The key that claims a group; ``None`` where none does.

        Raises:
            PatternError: Two keys do, with different ratios, and neither is more specific.
        """
        return self._most_specific(f"the channels of group {group.name!r}", self._claims(group))

    def claims(self, key: str, group: Group) -> bool:
        """Whether a key claims a group, a more specific one or not."""
        return key in self._claims(group)

    def _claims(self, group: Group) -> dict[str, Rank]:
        out: dict[str, Rank] = {}
        for key in self.by_key:
            ranks = [self._rank(key, weight) for weight in group.producers]
            made = [rank for rank in ranks if rank is not None]
            named = [rank for rank in made if rank[0] in (_PATH, _SUFFIX)]
            if key == group.name and key in self._groups:
                out[key] = (_GROUP,)
            elif named:
                out[key] = max(named)
            elif made and len(made) == len(ranks):  # what covers several weights claims what they make alone
                out[key] = min(made)
        return out

    def takes_part(self, key: str, group: Group) -> bool:
        """Whether a key covers any of the weights that make a group."""
        return any(self._rank(key, weight) is not None for weight in group.producers)

    def covers(self, key: str, name: str) -> bool:
        """Whether a key covers a parameter, or what is said of a module."""
        return self._rank(key, name) is not None or is_called(key, name)

    def _rank(self, key: str, weight: str) -> Rank | None:
        ranks = [self._rank_of_name(key, name) for name in self._aliases.get(weight, [weight])]
        return max((r for r in ranks if r is not None), default=None)

    def _rank_of_name(self, key: str, name: str) -> Rank | None:
        module = owner_of(name)
        if key == REST:
            return (_REST,)
        if key in self._expressions:
            matches = self._expressions[key].fullmatch
            return (_EXPRESSION,) if matches(module) or matches(name) else None
        if key in (module, name):
            return (_PATH,)
        if is_called(key, module) or is_called(key, name):
            return (_SUFFIX, key.count("."))
        around = next((path for path in containers_of(module) if is_called(key, path)), None)
        return None if around is None else (_CONTAINER, around.count("."), key.count("."))

    def _most_specific(self, what: str, ranks: Mapping[str, Rank]) -> str | None:
        claims = sorted(((rank, key) for key, rank in ranks.items()), reverse=True)
        if not claims:
            return None
        rank, winner = claims[0]
        for other, key in claims[1:]:
            if other == rank and self.by_key[key] != self.by_key[winner]:
                raise PatternError(
                    f"ratio: {key!r} ({self.by_key[key]}) and {winner!r} ({self.by_key[winner]}) both claim {what}, "
                    "and neither is more specific; give them the same ratio, or name the group"
                )
        return winner


def pools(ratio: float | Mapping[str, float], scope: str, model: nn.Module, coupling: Coupling) -> tuple[Pool, ...]:
    """Which of a model's groups are ranked together, and what share of their units goes.

    Args:
        ratio: One ratio, or ratios by key; what no key claims stays whole.
        scope: ``"group"``: each group by itself; ``"global"``: those that share a key, or all where there is one ratio.
        model: The model.
        coupling: Its coupling.

    Raises:
        PatternError: A key names nothing, or nothing that can go, or contradicts another.
    """
    if not isinstance(ratio, Mapping):
        return pooled(coupling.groups, ratio, scope)
    ratios = Ratios(model, ratio, (g.name for g in coupling.groups))
    claimed: dict[str, list[Group]] = {key: [] for key in ratio}
    for g in coupling.groups:
        key = ratios.of_group(g)
        if key is not None:
            claimed[key].append(g)
    for key, share in ratio.items():
        if share > 0.0 and key != REST and not any(ratios.claims(key, g) for g in coupling.groups):
            raise PatternError(_nothing(ratios, key, coupling))
    return tuple(pool for key, groups in claimed.items() if groups for pool in pooled(groups, ratio[key], scope))


def _nothing(ratios: Ratios, key: str, coupling: Coupling) -> str:
    """Why a key claims no group."""
    part = [g for g in coupling.groups if ratios.takes_part(key, g)]
    if part:
        return (
            f"ratio: {key!r} claims no group of channels: it only has a part in {some_of(repr(g.name) for g in part)}, "
            "which weights outside it make too; name the group, or one of the weights that make it"
        )
    why = next((k.reason for k in coupling.kept if ratios.covers(key, k.where)), "it makes none")
    return (
        f"ratio: {key!r} claims no channels that can go ({why}); groups are "
        f"{some_of(repr(g.name) for g in coupling.groups)}"
    )
