"""Patterns by name: how new ones are plugged in, and how strings become patterns."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from ..errors import PatternError
from .base import DENSE, Pattern

P = TypeVar("P", bound=Pattern)

_REGISTERED: dict[str, type[Pattern]] = {}


def register_pattern(name: str) -> Callable[[type[P]], type[P]]:
    """Class decorator that makes a pattern known by name.

    It then works in ``sparsify``, ``CoTrainer``, bundles and the command line with no other change.

    Args:
        name: Letters, digits and ``_ - : .``, starting with a letter; not ``"dense"``.

    Raises:
        PatternError: The name is malformed or taken, or what is decorated is no :class:`Pattern`.

    Example:
        ```python
        @cocktail.register_pattern("square")
        class Square(cocktail.Pattern):
            ...
        ```
    """
    if not isinstance(name, str) or name == DENSE or not re.fullmatch(r"[A-Za-z][\w\-:.]*", name):
        raise PatternError(
            f"a pattern cannot be named {name!r}: use letters, digits and _ - : . starting with a letter, not 'dense'"
        )

    def register(cls: type[P]) -> type[P]:
        if not (isinstance(cls, type) and issubclass(cls, Pattern)):
            raise PatternError(f"register_pattern({name!r}) decorates {cls!r}, which is not a subclass of Pattern")
        taken = _REGISTERED.get(name)
        # The same class defined again (a notebook cell run twice) replaces itself.
        if taken is not None and (taken.__module__, taken.__qualname__) != (cls.__module__, cls.__qualname__):
            raise PatternError(
                f"the name {name!r} is taken by {taken.__module__}.{taken.__qualname__}; choose another for "
                f"{cls.__module__}.{cls.__qualname__}"
            )
        cls.name = name
        _REGISTERED[name] = cls
        return cls

    return register


def registered() -> Mapping[str, type[Pattern]]:
    """All known patterns by name."""
    return dict(_REGISTERED)


def pattern_class(name: str) -> type[Pattern]:
    """The class registered under a name.

    Raises:
        PatternError: There is none.
    """
    if name not in _REGISTERED:
        raise PatternError(
            f"no pattern is registered as {name!r}{_near(name)}; import the module that registers it first "
            f"(registered: {', '.join(_REGISTERED)})"
        )
    return _REGISTERED[name]


def parse_pattern(spec: str) -> Pattern:
    """The pattern that a string stands for: ``"unstructured"``, ``"channel@0.3"``, ``"2:4"``, ``"channel@0.5+2:4"``.

    Raises:
        PatternError: No registered pattern knows the string, or its numbers make no sense.
    """
    spec = spec.strip()
    for cls in sorted(_REGISTERED.values(), key=lambda c: c.name != "product"):  # or its factors would be misread
        pattern = cls.parse(spec)
        if pattern is not None:
            return pattern
    raise PatternError(
        f"unknown pattern {spec!r}{_near(spec)}; known are {', '.join(map(repr, _REGISTERED))}, with a level as in "
        "'unstructured@0.5', N:M as in '2:4', and products as in 'channel@0.5+2:4'"
    )


def resolve_patterns(patterns: str | Pattern | Iterable[str | Pattern]) -> tuple[Pattern, ...]:
    """Patterns from names, spec strings and objects, each registered name once.

    Raises:
        PatternError: Unknown, unregistered, none at all, or two subnets of one name.
    """
    if isinstance(patterns, str | Pattern):
        patterns = (patterns,)
    try:
        requested = list(patterns)
    except TypeError:
        raise PatternError(f"patterns must be names or Pattern objects, not {patterns!r}") from None
    if not requested:
        raise PatternError(f"no patterns given; choose from {', '.join(map(repr, _REGISTERED))}")
    out: dict[str, Pattern] = {}
    for item in requested:
        pattern = parse_pattern(item) if isinstance(item, str) else item
        if not isinstance(pattern, Pattern):
            hint = f"; write {item.__name__}()" if isinstance(item, type) else ""
            raise PatternError(f"patterns must be names or Pattern objects, not {item!r}{hint}")
        if _REGISTERED.get(pattern.name) is not type(pattern):
            raise PatternError(
                f"{type(pattern).__name__} is not registered; decorate it with @register_pattern('a-name'), so that "
                "bundles can find it again"
            )
        if pattern.name in out:
            have = out[pattern.name]
            pattern = have if have == pattern else have.merged(pattern)
        out[pattern.name] = pattern
    owner: dict[str, str] = {DENSE: DENSE}
    for pattern in out.values():
        levels = pattern.subnets()
        if not levels:
            raise PatternError(f"pattern {pattern.name!r} has no subnets")
        for s in levels:
            if s.name in owner:
                raise PatternError(f"two subnets are named {s.name!r}: of {owner[s.name]!r} and of {pattern.name!r}")
            if s.pattern != pattern.name:
                raise PatternError(f"subnet {s.name!r} of pattern {pattern.name!r} says it is of {s.pattern!r}")
            owner[s.name] = pattern.name
    return tuple(out.values())


def make_pattern(name: str, config: Mapping[str, Any]) -> Pattern:
    """The pattern that ``config()`` came from.

    Raises:
        PatternError: Not registered, or its class does not take these arguments.
    """
    cls = pattern_class(name)
    try:
        return cls.from_config(config)
    except (TypeError, ValueError) as e:
        raise PatternError(f"pattern {name!r} ({cls.__name__}) cannot be made from {dict(config)!r}: {e}") from e


def _near(spec: str) -> str:
    name = spec.partition("@")[0]
    near = difflib.get_close_matches(name, _REGISTERED, n=2, cutoff=0.5)
    return f" (did you mean {' or '.join(map(repr, near))}?)" if near else ""
