"""JSON values from a file that anybody may have written: each is what it should be, or is refused."""

from __future__ import annotations

import itertools
import json
import reprlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Never

from ..errors import BundleError
from ..printable import printable
from .limits import MAX_JSON_VALUES

_LARGEST = 2**63 - 1


def parse(raw: bytes) -> Any:
    """JSON as the standard has it: UTF-8, no NaN, no key twice.

    Raises:
        ValueError: It is not, or it has too many values.
        RecursionError: It is nested too deeply.
    """
    # Before parsing, which may take a hundred times the memory: every value but the first follows a comma or an opening
    # bracket. Strings may hold these too, so that this counts too many values rather than too few.
    values = raw.count(b",") + raw.count(b"[") + raw.count(b"{")
    if values > MAX_JSON_VALUES:
        raise ValueError(f"it has {values} values; at most {MAX_JSON_VALUES} are read")
    return json.loads(raw.decode("utf-8"), parse_constant=_no_constant, object_pairs_hook=_once)


def integer(value: Any, what: str, low: int = 0, high: int = _LARGEST) -> int:
    """A whole number in ``low … high``."""
    if type(value) is not int or not low <= value <= high:
        raise BundleError(f"the bundle gives {quoted(value)} for {what}, not a whole number in {low} … {high}")
    return value


def text(value: Any, what: str) -> str:
    """A string."""
    if type(value) is not str:
        raise BundleError(f"the bundle gives {quoted(value)} for {what}, not a text")
    return value


def label(value: Any, what: str) -> str:
    """A string that people read and no program looks up."""
    return printable(text(value, what))


def flag(value: Any, what: str) -> bool:
    """``true`` or ``false``."""
    if type(value) is not bool:
        raise BundleError(f"the bundle gives {quoted(value)} for {what}, not true or false")
    return value


def items(value: Any, what: str, count: int | None = None) -> list[Any]:
    """A list, of so many values if a count is given."""
    if type(value) is not list or (count is not None and len(value) != count):
        many = "" if count is None else f" of {count}"
        raise BundleError(f"the bundle gives {quoted(value)} for {what}, not a list{many}")
    return value


def texts(value: Any, what: str) -> list[str]:
    """A list of strings, no two alike."""
    return distinct([text(v, what) for v in items(value, what)], what)


def distinct(values: list[Any], what: str) -> list[Any]:
    """Values no two of which are alike."""
    if len(set(values)) != len(values):
        raise BundleError(f"the bundle names one of {what} twice")
    return values


def keyed(value: Any, what: str, needed: Collection[str], allowed: Collection[str] = ()) -> Mapping[str, Any]:
    """An object with all the keys needed, and none but those and the ones allowed."""
    if type(value) is not dict:
        raise BundleError(f"the bundle gives {quoted(value)} for {what}, not an object")
    missing, odd = set(needed) - value.keys(), value.keys() - set(needed) - set(allowed)
    if missing or odd:
        problems = [f"lacks {quoted(k)}" for k in sorted(missing)[:3]] + [f"has {quoted(k)}" for k in sorted(odd)[:3]]
        raise BundleError(f"in the bundle {what} {', '.join(problems)}")
    return value


def quoted(value: Any) -> str:
    """A value as an error names it: short, on one line, whatever its size and depth."""
    if type(value) is dict:
        value = dict(itertools.islice(value.items(), _SHORT.maxdict + 1))  # they would all be sorted
    short = repr(value) if type(value) in (bool, int, float, str, type(None)) else _SHORT.repr(value)
    return short if len(short) <= 60 else f"{short[:57]}..."


_SHORT = reprlib.Repr()  # 16 MiB of lists in lists take a second and a deep stack otherwise


def small(value: Any, most: int) -> bool:
    """Whether JSON values hold so many values at most."""
    stack = [value]
    while stack and most >= 0:
        inner = stack.pop()
        most -= 1
        if isinstance(inner, dict | list):
            if len(inner) > most:
                return False
            stack += inner.values() if isinstance(inner, dict) else inner
    return most >= 0


def more(names: Sequence[str]) -> str:
    """How many names there are besides the first."""
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def shortened(error: Exception) -> str:
    """What an error says, on one line and not at any length."""
    short = printable(" ".join(str(error).split()))
    return short if len(short) <= 500 else f"{short[:497]}..."


def _no_constant(name: str) -> Never:
    raise ValueError(f"{name} is no JSON")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        raise ValueError("an object has a key twice")
    return out
