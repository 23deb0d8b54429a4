"""Which subnetworks come nearest to a name that none has: by their values, not by their spelling."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence

__all__ = ["loose", "nearest_subnets", "no_subnet", "shown"]

_PAIR = re.compile(r"(.*?)(\d+)\s*:\s*(\d+)")
_LEVEL = re.compile(r"(.*?)@([^@]*)")
_LOOSE = re.compile(r"([a-z][a-z _-]*?)[ _=:,-]*(\d*\.?\d+)")  # channel0.5, channel=0.5, channel 50
MOST_READ = 200
"""Characters of a name that are looked at."""

Factor = tuple[str, float | None, tuple[int, ...]]
"""Of ``channel@0.5`` the pattern, the sparsity and nothing; of ``2:4`` no name, the sparsity and the two numbers."""


def nearest_subnets(asked: str, names: Iterable[str], most: int = 3) -> list[str]:
    """The names that come nearest to one, the nearest first.

    Those of the same pattern are compared by their sparsity; the pattern is the one that is spelled most like the one
    asked for. Where none is, every pattern gives its nearest value.

    Args:
        asked: The name that was asked for.
        names: Those that there are.
        most: How many to return.
    """
    want = _read(asked[:MOST_READ])
    known = {name: _read(name) for name in names}
    by_pattern: dict[str, list[str]] = {}
    for name, factors in known.items():
        by_pattern.setdefault(_pattern(factors), []).append(name)
    for group in by_pattern.values():
        group.sort(key=lambda name: _apart(want, known[name]))
    head = _pattern(want)
    if head in by_pattern:
        return by_pattern[head][:most]
    near = difflib.get_close_matches(head, [h for h in by_pattern if h], n=1, cutoff=0.5) if head else []
    if near:
        return by_pattern[near[0]][:most]
    if any(value is not None for _, value, _ in want):
        firsts = [group[0] for group in by_pattern.values() if known[group[0]][0][1] is not None]
        form = [bool(numbers) for _, _, numbers in want]  # N:M for N:M, levels for levels, products for products
        firsts.sort(key=lambda name: ([bool(n) for _, _, n in known[name]] != form, _apart(want, known[name])))
        return firsts[:most] or list(known)[:most]
    return difflib.get_close_matches(asked[:MOST_READ], known, n=most, cutoff=0.4) or list(known)[:most]


def no_subnet(asked: object, names: Sequence[str], listed_by: str = "net.names lists") -> str:
    """The error for a name that no subnetwork has.

    Args:
        asked: What was asked for.
        names: Those that there are.
        listed_by: What shows all of them, with its verb.
    """
    near = ", ".join(nearest_subnets(str(asked), names))
    return f"no subnet {shown(asked)}; nearest: {near} ({listed_by} all {len(names)})"


def loose(name: str) -> tuple[str, float] | None:
    """A name with its level as a number: ``channel@0.10`` and ``channel@0.1`` are one; ``None`` where it has none."""
    pattern, at, level = name.partition("@")
    if not at:
        return None
    try:
        return pattern.strip(), round(float(level), 3)
    except ValueError:
        return None


def shown(asked: object) -> str:
    """A name as errors show it: quoted, without anything that moves the cursor, and not longer than a line."""
    text = str(asked)
    return repr(text if len(text) <= 60 else f"{text[:59]}…")


def _read(name: str) -> tuple[Factor, ...]:
    return tuple(_factor(part.strip().lower()) for part in name.split("+"))


def _factor(text: str) -> Factor:
    if pair := _PAIR.fullmatch(text):
        n, m = int(pair[2]), int(pair[3])
        return pair[1].strip(" @"), (1 - n / m if m else None), (n, m)
    found = _LEVEL.fullmatch(text) or _LOOSE.fullmatch(text.rstrip("%"))
    if found is None:
        return text, None, ()
    try:
        value = float(found[2].strip(" %"))
    except ValueError:
        return found[1].strip(), None, ()
    return found[1].strip(), (value / 100 if 1 < value <= 100 else value), ()


def _pattern(factors: Sequence[Factor]) -> str:
    return "+".join(head for head, _, _ in factors)


def _apart(a: Sequence[Factor], b: Sequence[Factor]) -> tuple[float, float]:
    """How far apart two names are: in sparsity, then in the numbers of N:M."""
    values = [abs(x[1] - y[1]) for x, y in zip(a, b, strict=False) if x[1] is not None and y[1] is not None]
    numbers = [abs(i - j) for x, y in zip(a, b, strict=False) for i, j in zip(x[2], y[2], strict=False)]
    gap = round(sum(values), 9)  # or 1 - 2/5 and 1 - 4/10 would differ
    return gap if gap == gap else 0.0, float(sum(numbers))
