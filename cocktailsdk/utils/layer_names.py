"""Names of layers, and of many repeated layers in few words: ``layer2.{0..3}.bn2``."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence

__all__ = ["few", "folded", "nearest", "owner", "pattern_of", "short"]

NUMBER = re.compile(r"(?<![^.])\d+(?![^.])|(?<=[A-Za-z_])\d+(?=\.)")
"""A part of a path that is a number, or a container's part that ends with one (``layer1.``, but not ``conv1``)."""


BLANK = "\0"
"""In place of a number while names are compared; no name holds it."""


def owner(tensor: str) -> str:
    """Path of the module that owns a parameter or buffer."""
    return tensor.rpartition(".")[0]


def short(tensor: str) -> str:
    """What a parameter is called where its layer is meant: ``conv1`` for ``conv1.weight``."""
    return tensor.removesuffix(".weight")


def few(names: Iterable[str], most: int) -> str:
    """``a, b and 3 more``: each name once, at most so many of them."""
    every = list(dict.fromkeys(names))
    more = f" and {len(every) - most} more" if len(every) > most else ""
    return ", ".join(every[:most]) + more


def pattern_of(name: str) -> str:
    """The name with ``#`` in place of its numbers: the same for layers of repeated blocks."""
    return NUMBER.sub("#", name)


def folded(names: Iterable[str]) -> list[str]:
    """Names that differ in one number become one name, again and again; in order of first appearance.

    Example:
        ```python
        folded(["layer2.0.bn1", "layer2.1.bn1", "fc"])  # ["layer2.{0,1}.bn1", "fc"]
        ```
    """
    every = list(dict.fromkeys(names))
    shapes = [NUMBER.sub(BLANK, name) for name in every]
    numbers = [[{int(n)} for n in NUMBER.findall(name)] for name in every]
    for at in range(max(map(len, numbers), default=0) - 1, -1, -1):
        merged: dict[object, int] = {}
        for k, shape in enumerate(shapes):
            if at >= len(numbers[k]):
                merged[k] = k
                continue
            others = tuple(tuple(sorted(n)) for i, n in enumerate(numbers[k]) if i != at)
            first = merged.setdefault((shape, others), k)
            if first != k:
                numbers[first][at] |= numbers[k][at]
        alive = sorted(merged.values())
        shapes, numbers = [shapes[k] for k in alive], [numbers[k] for k in alive]
    return [_filled(shape, values) for shape, values in zip(shapes, numbers, strict=True)]


def _filled(shape: str, numbers: Sequence[set[int]]) -> str:
    first, *others = shape.split(BLANK)
    return first + "".join(_numbers(n) + part for n, part in zip(numbers, others, strict=True))


def _numbers(values: set[int]) -> str:
    """``3``, ``{0..5}``, ``{0,2,7..9}``."""
    runs: list[list[int]] = []
    for n in sorted(values):
        if runs and runs[-1][-1] == n - 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    texts = [f"{r[0]}..{r[-1]}" if len(r) > 2 else ",".join(map(str, r)) for r in runs]
    return texts[0] if len(values) == 1 else "{" + ",".join(texts) + "}"


def nearest(name: str, among: Sequence[str]) -> str:
    """``"; did you mean …?"`` with the names that come nearest, or nothing."""
    near = difflib.get_close_matches(name, among, n=3, cutoff=0.6)
    near = near or [a for a in among if a.endswith(f".{name}") or f".{name}." in f".{a}."][:3]
    return f"; did you mean {' or '.join(near)}?" if near else ""
