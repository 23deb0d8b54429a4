"""The numbers of a transformers configuration: where they stand, what they say, and a copy with others."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from types import CodeType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Number", "Place", "Value", "Values", "in_words", "numbers_of", "open_widths", "with_values"]

Place = tuple[str | int, ...]
"""Where a number stands in a configuration: ``("text_config", "hidden_size")``, ``("num_heads", 2)``."""

Value = int | float
Values = dict[Place, Value]
Number = tuple[Place, Value | None]

MULTIPLIERS = ("ratio", "expan", "mult", "factor")
"""What the names of fractions that widths are made with contain, other than probabilities and tolerances."""


def numbers_of(config: Any, fractions: tuple[str, ...] = MULTIPLIERS, at: Place = ()) -> Iterator[Number]:
    """Numbers in a configuration and those inside it; ``None`` where one is left open.

    Args:
        config: The configuration.
        fractions: What the names of the fractions contain that are of interest.
        at: Where the configuration itself stands.
    """
    for name, value in vars(config).items():
        if not name.startswith("_") and not name.endswith("_token_id"):
            yield from _numbers_in(value, fractions, (*at, name))


def _numbers_in(value: Any, fractions: tuple[str, ...], at: Place) -> Iterator[Number]:
    if hasattr(value, "to_diff_dict"):
        yield from numbers_of(value, fractions, at)
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value[:64]):
            yield from _numbers_in(item, fractions, (*at, i))
    elif value is None:
        yield at, None
    elif isinstance(value, float):
        if any(part in str(at[-1]) for part in fractions):
            yield at, value
    elif isinstance(value, int) and not isinstance(value, bool) and value > 0:
        yield at, value


def with_values(config: Any, values: Mapping[Place, Value]) -> Any:
    """A deep copy of a configuration with other numbers.

    Raises:
        ValueError: The configuration refuses one.
    """
    made = copy.deepcopy(config)
    for place, value in values.items():
        owner, at = made, 0
        while at < len(place) - 1 and hasattr(getattr(owner, str(place[at])), "to_diff_dict"):
            owner, at = getattr(owner, str(place[at])), at + 1
        name = str(place[at])
        setattr(owner, name, _replaced(getattr(owner, name, None), place[at + 1 :], value))
    return made


def _replaced(value: Any, place: Place, new: Value) -> Any:
    if not place:
        return new
    items = list(value)
    items[int(place[0])] = _replaced(items[int(place[0])], place[1:], new)
    return type(value)(items)


def in_words(values: Mapping[Place, Value]) -> str:
    """As one would write them: ``intermediate_size=24, num_heads.1=2``."""
    return ", ".join(f"{'.'.join(map(str, place))}={value}" for place, value in values.items())


def _place_of(config: Any, wanted: Any, at: Place = ()) -> Place | None:
    """Where, inside a configuration, the one stands that a module was given: that object, or a copy of it."""
    if config is wanted or type(config) is type(wanted):
        return at
    for name, value in vars(config).items():
        if hasattr(value, "to_diff_dict"):
            found = _place_of(value, wanted, (*at, name))
            if found is not None:
                return found
    return None


def open_widths(config: Any, model: nn.Module) -> Values:
    """Numbers that a configuration leaves open, which modules ask it for, as the modules have worked them out.

    ``getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)``: with fewer heads the head would
    become wider, unless its width is said.
    """
    found: dict[Place, set[int]] = {}
    for module in model.modules():
        own = getattr(module, "config", None)
        at = _place_of(config, own) if hasattr(own, "to_diff_dict") else None
        if at is None:
            continue
        attributes, strings = _asked_for(type(module))
        for name, value in vars(module).items():
            is_open = name in (attributes if hasattr(own, name) else strings) and getattr(own, name, None) is None
            if is_open and isinstance(value, int) and not isinstance(value, bool) and value > 0:
                found.setdefault((*at, name), set()).add(value)
    return {place: values.pop() for place, values in found.items() if len(values) == 1}


def _asked_for(cls: type) -> tuple[set[str], set[str]]:
    """Names that the code which builds a module uses: as attributes, and as strings (``getattr``)."""
    attributes, strings = set[str](), set[str]()
    for base in cls.__mro__:
        code: CodeType | None = getattr(vars(base).get("__init__"), "__code__", None)
        if code is not None:
            attributes.update(code.co_names)
            strings.update(c for c in code.co_consts if isinstance(c, str))
    return attributes, strings
