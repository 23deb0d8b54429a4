"""Scores by name: how new ones are plugged in."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping
from typing import TypeVar

from ...errors import PatternError
from .base import Score

__all__ = ["register_score", "registered_scores", "score_named"]

S = TypeVar("S", bound=Score)

_REGISTERED: dict[str, type[Score]] = {}


def register_score(name: str) -> Callable[[type[S]], type[S]]:
    """Class decorator that makes a score known by name, in ``sparsify``, ``CoTrainer``, ``slim`` and the command line.

    Args:
        name: Letters, digits, ``_`` and ``-``, starting with a letter.

    Raises:
        PatternError: The name is malformed or taken, or what is decorated is no :class:`Score`.
    """
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z][\w\-]*", name):
        raise PatternError(f"a score cannot be named {name!r}: use letters, digits, _ and -, starting with a letter")

    def register(cls: type[S]) -> type[S]:
        if not (isinstance(cls, type) and issubclass(cls, Score)):
            raise PatternError(f"register_score({name!r}) decorates {cls!r}, which is not a subclass of Score")
        taken = _REGISTERED.get(name)
        # The same class defined again (a notebook cell run twice) replaces itself.
        if taken is not None and (taken.__module__, taken.__qualname__) != (cls.__module__, cls.__qualname__):
            raise PatternError(f"the score {name!r} is taken by {taken.__module__}.{taken.__qualname__}")
        if not cls.scores_elements() and not cls.scores_units() and not cls.scores_layers():
            raise PatternError(f"score {name!r}: {cls.__name__} overrides neither elements nor units nor layers")
        cls.name = name
        _REGISTERED[name] = cls
        return cls

    return register


def registered_scores() -> Mapping[str, type[Score]]:
    """All known scores by name."""
    return dict(_REGISTERED)


def score_named(name: str) -> type[Score]:
    """The class registered under a name.

    Raises:
        PatternError: There is none.
    """
    if name not in _REGISTERED:
        near = difflib.get_close_matches(name, _REGISTERED, n=1, cutoff=0.5)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise PatternError(f"no score is called {name!r}{hint}; there are {', '.join(map(repr, _REGISTERED))}")
    return _REGISTERED[name]
