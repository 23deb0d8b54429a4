"""The search for the numbers of a configuration that give a model of certain shapes.

Which number makes which width is nowhere written down. It is found by building: a model made from a changed
configuration, without memory for its weights, shows what the change does. No model type has a rule of its own.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations, islice
from typing import TYPE_CHECKING, Any

from .transformers_configs import Place, Value, Values, numbers_of, open_widths, with_values

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Attempt", "Search", "Shapes", "pattern_of", "shapes_of"]

Shapes = dict[str, tuple[int, ...]]


def shapes_of(model: nn.Module) -> Shapes:
    """Shapes of everything that a checkpoint of a model holds, by name."""
    return {name: tuple(t.shape) for name, t in model.state_dict().items() if hasattr(t, "shape")}


@dataclass(frozen=True)
class Attempt:
    """Numbers tried.

    Attributes:
        values: The numbers, where they differ from the configuration's.
        wrong: Of the model built with them, the first axis of each tensor whose size is wrong: ``(built, wanted)``.
    """

    values: Values
    wrong: Mapping[tuple[str, int], tuple[int, int]]


class Search:
    """Finds numbers for a configuration with which a model has certain shapes.

    One wrong size is looked at after the other. A number may be what makes it if, multiplied as the size must be, it
    stays whole; the model built with it shows whether it is. Sizes that are products or sums (fused q, k and v) may
    need several numbers at once. Wrong turns (narrower heads instead of fewer) are taken back.

    Args:
        config: The configuration as it is; not altered.
        build: Builds a model of a configuration without memory for its weights; raises where it cannot.
        wanted: The shapes.
        slim: The model that has them; numbers that its modules name as the configuration does break ties.

    Attributes:
        base: The shapes that the configuration gives as it is.
    """

    MOST = 300
    """Models built."""

    SOLUTIONS = 6
    """Solutions looked at before changes are that shapes do not show."""

    def __init__(self, config: Any, build: Callable[[Any], nn.Module], wanted: Shapes, slim: nn.Module) -> None:
        self._build, self._wanted = build, wanted
        self._plain = config
        base = build(copy.deepcopy(config))
        self.base = shapes_of(base)
        self._shapes: dict[frozenset[tuple[Place, Value]], Shapes | None] = {frozenset(): self.base}
        self._touched: dict[Place, set[tuple[str, int]]] = {}  # sizes that a number was seen to change
        self._left = self.MOST
        self._config = config
        spoken = open_widths(config, base)
        if spoken and self._built(spoken) == self.base:
            self._config = with_values(config, spoken)
            self._shapes = {frozenset(): self.base}
        else:
            spoken = {}
        self._spoken = spoken
        self._numbers = dict(numbers_of(self._config))
        self._said = _said_by(slim, base)

    def solutions(self) -> Iterator[Values]:
        """Numbers that give the shapes, the likeliest first. Other things may still be wrong: heads have no shape."""
        found = []
        for values in islice(self._extended({}), self.SOLUTIONS):
            found.append(values)
            yield {**self._needed(values), **values}
        for values in found:
            for more in self._unseen(values):
                yield {**self._needed(values), **values, **more}

    def _unseen(self, values: Values) -> Iterator[Values]:
        """Changes that leave the shapes as they are: numbers that the slim model's modules say, then any one number."""
        shapes = self._built(values)
        more: Values = {}
        for place, value in self._numbers.items():
            said = self._said.get((str(place[-1]), value), set())
            if place not in values and len(said) == 1 and value not in said:
                more[place] = next(iter(said))
        if more and self._built({**values, **more}) == shapes:
            yield more
        ratios = dict.fromkeys(self._wrong(self.base).values())
        for place, value in self._numbers.items():
            if place not in values and place not in more and isinstance(value, int):
                for new in dict.fromkeys(_scaled(value, *ratio) for ratio in ratios):
                    if new is not None and self._built({**values, place: new}) == shapes:
                        yield {place: new}

    def nearest(self) -> Attempt:
        """Where there is no solution: numbers that leave little wrong, and what that is."""
        values: Values = {}
        wrong = self._wrong(self.base)
        tried: set[tuple[str, int]] = set()
        while where := next((w for w in wrong if (pattern_of(w[0]), w[1]) not in tried), None):
            tried.add((pattern_of(where[0]), where[1]))
            for more in self._moves(values, where, *wrong[where]):
                shapes = self._built({**values, **more})
                left = self._wrong(shapes) if shapes is not None else wrong
                if len(left) < len(wrong):
                    values, wrong = {**values, **more}, left
                    break
        return Attempt({**self._needed(values), **values}, wrong)

    def _needed(self, values: Values) -> Values:
        """Of the widths that the configuration leaves open, those that it must say beside these numbers."""
        needed = {place: value for place, value in self._spoken.items() if place not in values}
        shapes = self._built(values)
        for place in list(needed):
            fewer = {p: v for p, v in needed.items() if p != place}
            try:
                same = shapes_of(self._build(with_values(self._plain, {**fewer, **values}))) == shapes
            except Exception:  # configurations and models refuse in their own ways
                same = False
            needed = fewer if same else needed
        return needed

    def _built(self, values: Values) -> Shapes | None:
        """Shapes of a model built with other numbers; ``None`` if it cannot be, or has other tensors."""
        key = frozenset(values.items())
        if key not in self._shapes:
            if self._left <= 0:
                return None
            self._left -= 1
            try:
                made: Shapes | None = shapes_of(self._build(with_values(self._config, values)))
            except Exception:  # configurations and models refuse in their own ways
                made = None
            if made is not None and (
                made.keys() != self._wanted.keys() or any(len(s) != len(self._wanted[n]) for n, s in made.items())
            ):
                made = None
            self._shapes[key] = made
        return self._shapes[key]

    def _wrong(self, shapes: Shapes) -> dict[tuple[str, int], tuple[int, int]]:
        return {
            (name, axis): (built, self._wanted[name][axis])
            for name, shape in shapes.items()
            for axis, built in enumerate(shape)
            if built != self._wanted[name][axis]
        }

    def _extended(self, values: Values) -> Iterator[Values]:
        shapes = self._built(values)
        if shapes is None:
            return
        wrong = self._wrong(shapes)
        if not wrong:
            yield values
            return
        where = next(iter(wrong))
        for more in self._moves(values, where, *wrong[where]):
            yield from self._extended({**values, **more})

    def _moves(self, values: Values, where: tuple[str, int], built: int, wanted: int) -> Iterator[Values]:
        """Changes that make one size right, the likeliest first."""
        name, axis = where
        right: list[tuple[int, int, int, Values]] = []
        partial: Values = {}
        before = self._built(values) or {}
        for place, value in self._numbers.items():
            if place in values or where not in self._touched.get(place, {where}):
                continue
            probes = _probes(value, (built, wanted), (self.base[name][axis], wanted))
            while probes:
                new = probes.pop(0)
                shapes = self._built({**values, place: new})
                if shapes is not None:
                    self._touched.setdefault(place, set()).update(_changes(before, shapes))
                if shapes is not None and shapes[name][axis] == built:
                    break
                if shapes is not None and shapes[name][axis] == wanted:
                    right.append((self._doubt(place, value, new), len(self._wrong(shapes)), len(right), {place: new}))
                    break
                if new == _scaled(value, built, wanted):
                    partial[place] = new
                if not probes and shapes is not None and value is not None:
                    probes += _secant(value, new, built, shapes[name][axis], wanted)
        right.sort(key=lambda r: r[:3])
        yield from (more for doubt, *_, more in right if doubt <= 0)
        most = 3 if len(partial) <= 6 else 2
        for size in range(2, most + 1):
            for several in combinations(partial, size):
                more = {place: partial[place] for place in several}
                shapes = self._built({**values, **more})
                if shapes is not None and shapes[name][axis] == wanted:
                    yield more
        yield from (more for doubt, *_, more in right if doubt > 0)

    def _doubt(self, place: Place, value: Value | None, new: Value) -> int:
        """Whether the slim model's own modules say this number (-1), another one (1), or nothing (0)."""
        said = self._said.get((str(place[-1]), value), set())
        return -1 if new in said else int(bool(said))


def pattern_of(name: str) -> str:
    """A tensor's name without the numbers of layers."""
    return re.sub(r"(^|(?<=\.))\d+(?=\.)", "*", name)


def _changes(before: Shapes, shapes: Shapes) -> Iterator[tuple[str, int]]:
    """Axes whose sizes differ."""
    for name, shape in shapes.items():
        if shape != before[name]:
            yield from ((name, axis) for axis, size in enumerate(shape) if size != before[name][axis])


def _scaled(value: Value | None, built: int, wanted: int) -> Value | None:
    """A number multiplied as a size must be; ``None`` where that gives no number."""
    if value is None:
        return wanted
    if isinstance(value, float):
        return value * wanted / built
    whole, rest = divmod(value * wanted, built)
    return whole if rest == 0 and whole > 0 and whole != value else None


def _probes(value: Value | None, *ratios: tuple[int, int]) -> list[Value]:
    """What a number may become if a size goes from one number to another; if nothing fits, half of it, to see."""
    found = dict.fromkeys(new for built, wanted in ratios if (new := _scaled(value, built, wanted)) is not None)
    if not found and isinstance(value, int) and value > 1:
        return [value // 2]
    return list(found)


def _secant(value: Value, tried: Value, built: int, became: int, wanted: int) -> list[Value]:
    """What a number must be, if the size goes with it in a straight line."""
    if became == built or isinstance(value, float) or isinstance(tried, float):
        return []
    steps, rest = divmod((wanted - built) * (tried - value), became - built)
    new = value + steps
    return [new] if rest == 0 and new > 0 and new not in (value, tried) else []


def _said_by(slim: nn.Module, dense: nn.Module) -> dict[tuple[str, Value | None], set[int]]:
    """By name and number in the dense model's modules, what the slim one's have in that place."""
    said: dict[tuple[str, Value | None], set[int]] = {}
    others = dict(dense.named_modules())
    for path, module in slim.named_modules():
        other = others.get(path)
        if type(other) is not type(module):
            continue
        for name, value in vars(module).items():
            was = vars(other).get(name)
            if isinstance(value, int) and isinstance(was, int) and not isinstance(value, bool):
                said.setdefault((name, was), set()).add(value)
    return said
