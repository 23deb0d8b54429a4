"""Kinds of values that a build record may hold, within the bounds that the bundle's tensors set.

A kind is a function of a value and the bundle's bounds. It returns ``None`` for a value that it allows, else what it
allows in words. Values are plain JSON: ``True`` is no number, and strings come from closed sets.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

__all__ = ["ACTIVATIONS", "KINDS", "MOST_POSITIONS", "Bounds", "Kind", "each_of", "number", "one_of", "shown"]

MOST_POSITIONS = 1 << 24
"""Of integers that no tensor's shape depends on: token numbers, positions of rotary embeddings."""

MOST_LABELS = 1 << 16
"""A configuration makes a dictionary of labels of the integer ``num_labels``."""


@dataclass(frozen=True)
class Bounds:
    """What the tensors of a bundle allow its build record to ask for: upper limits of the record's integers.

    Attributes:
        tensors: How many tensors the model has: no part of it is repeated more often.
        largest: The largest dimension of any tensor: no layer is wider.
    """

    tensors: int = 100_000
    largest: int = MOST_POSITIONS

    @classmethod
    def of(cls, shapes: Iterable[Sequence[int]]) -> Self:
        """The limits for a model with tensors of these shapes. Empty tensors widen nothing: they take no bytes."""
        full = [s for s in shapes if 0 not in s]
        return cls(len(full), max((d for s in full for d in s), default=0))


Kind = Callable[[Any, Bounds], str | None]

ACTIVATIONS = frozenset(
    (
        *("gelu", "gelu_10", "gelu_accurate", "gelu_fast", "gelu_new", "gelu_python", "gelu_pytorch_tanh"),
        *("gelu_python_tanh", "hardswish", "laplace", "leaky_relu", "linear", "mish", "prelu", "quick_gelu", "relu"),
        *("relu2", "relu6", "sigmoid", "silu", "sqrtsoftplus", "swish", "tanh"),
    )
)
"""Of ``transformers.activations``; ``xielu`` is not among them, since it looks for a compiled kernel."""

_CLASS_NAME = re.compile(r"[A-Z][A-Za-z0-9_]{0,127}")
_MOST_LIST = 4096
_MOST_LABEL = 256


def shown(value: Any) -> str:
    """A JSON value in an error: on one line, short, whatever its size and depth."""
    if type(value) in (dict, list):
        kind = "an object" if type(value) is dict else "a list"
        return f"{kind} of {len(value)}"
    if type(value) is str:
        return repr(value if len(value) <= 60 else f"{value[:57]}...")
    # Python refuses to write out integers of thousands of digits.
    return "a huge integer" if type(value) is int and value.bit_length() > 200 else repr(value)


def integer(value: Any, low: int, high: int) -> bool:
    """Whether a value is a whole number from ``low`` to ``high``."""
    return type(value) is int and low <= value <= high


def number(value: Any, low: float, high: float) -> bool:
    """Whether a value is a finite number from ``low`` to ``high``."""
    # NaN compares false; infinities and integers beyond every float are out of range.
    return type(value) in (int, float) and low <= value <= high


def whole(limits: Callable[[Bounds], tuple[int, int]], which: str = "") -> Kind:
    """A whole number between limits that depend on the bundle."""

    def kind(value: Any, bounds: Bounds) -> str | None:
        low, high = limits(bounds)
        return None if integer(value, low, high) else f"a whole number from {low} to {high}{which}"

    return kind


def one_of(names: Collection[str]) -> Kind:
    """A string of a set."""

    def kind(value: Any, bounds: Bounds) -> str | None:
        del bounds
        return None if type(value) is str and value in names else f"one of {', '.join(sorted(names)[:8])} …"

    return kind


def each_of(kind: Kind, most: Callable[[Bounds], int] = lambda bounds: min(bounds.tensors, _MOST_LIST)) -> Kind:
    """A list of values of a kind."""

    def listed(value: Any, bounds: Bounds) -> str | None:
        if type(value) is not list or len(value) > most(bounds):
            return f"a list of at most {most(bounds)} values"
        wrong = [expected for v in value if (expected := kind(v, bounds)) is not None]
        return f"a list of which each is {wrong[0]}" if wrong else None

    return listed


def either(*kinds: Kind) -> Kind:
    """A value of one of several kinds."""

    def kind(value: Any, bounds: Bounds) -> str | None:
        expected = [k(value, bounds) for k in kinds]
        return None if None in expected else " or ".join(str(s) for s in expected)

    return kind


def _flag(value: Any, bounds: Bounds) -> str | None:
    del bounds
    return None if type(value) is bool else "true or false"


_size = whole(lambda bounds: (0, bounds.largest), ", the bundle's largest dimension")
_depth = whole(lambda bounds: (0, bounds.tensors), ", the number of the bundle's tensors")
_stage_number = whole(lambda bounds: (-bounds.tensors, bounds.tensors))
_count = whole(lambda bounds: (0, min(bounds.largest, MOST_LABELS)))
_position = whole(lambda bounds: (0, MOST_POSITIONS))
_token = whole(lambda bounds: (-1, MOST_POSITIONS))
# Images and windows are larger than any tensor of a convolutional network.
_extent = whole(lambda bounds: (1, max(4096, bounds.largest)))


def _depths(value: Any, bounds: Bounds) -> str | None:
    # Swin makes a list of all layers, of all stages together.
    wrong = each_of(_depth)(value, bounds)
    fits = wrong is None and sum(value) <= bounds.tensors
    return None if fits else wrong or f"a list of at most {bounds.tensors} in all, the number of the bundle's tensors"


def _fraction(value: Any, bounds: Bounds) -> str | None:
    del bounds
    return None if number(value, 0, 1) else "a number from 0 to 1"


def _real(value: Any, bounds: Bounds) -> str | None:
    del bounds
    return None if number(value, -1e9, 1e9) else "a finite number from -1e9 to 1e9"


def _nothing(value: Any, bounds: Bounds) -> str | None:
    del value, bounds
    return "null"


def _names(value: Any, bounds: Bounds) -> str | None:
    del bounds
    fits = type(value) is list and len(value) <= 8
    fits = fits and all(type(v) is str and _CLASS_NAME.fullmatch(v) for v in value)
    return None if fits else "a list of at most 8 class names"


def _label(value: Any) -> bool:
    return type(value) is str and len(value) <= _MOST_LABEL and value.isprintable()


def _labels(value: Any, bounds: Bounds) -> str | None:
    most = min(bounds.largest, MOST_LABELS)
    fits = type(value) is dict and len(value) <= most
    fits = fits and all(k.isascii() and k.isdigit() and len(k) <= 9 and _label(v) for k, v in value.items())
    return None if fits else f"an object of at most {most} printable labels by their numbers"


def _label_numbers(value: Any, bounds: Bounds) -> str | None:
    most = min(bounds.largest, MOST_LABELS)
    fits = type(value) is dict and len(value) <= most
    fits = fits and all(_label(k) and integer(v, 0, MOST_POSITIONS) for k, v in value.items())
    return None if fits else f"an object of at most {most} numbers by their printable labels"


_FACTORS = each_of(_real)

_ROPE: Mapping[str, Kind] = {
    "rope_type": one_of({"default", "linear", "dynamic", "yarn", "longrope", "llama3"}),
    "type": one_of({"default", "linear", "dynamic", "yarn", "longrope", "llama3"}),
    "rope_theta": _real,
    "factor": _real,
    "partial_rotary_factor": _fraction,
    "original_max_position_embeddings": _position,
    "attention_factor": _real,
    "beta_fast": _real,
    "beta_slow": _real,
    "low_freq_factor": _real,
    "high_freq_factor": _real,
    "short_factor": _FACTORS,
    "long_factor": _FACTORS,
    "mscale": _real,
    "mscale_all_dim": _real,
    "truncate": _flag,
}


def _rope(value: Any, bounds: Bounds) -> str | None:
    if type(value) is not dict:
        return "an object"
    for key, entry in value.items():
        if key not in _ROPE:
            return f"an object without {shown(key)}"
        expected = None if entry is None else _ROPE[key](entry, bounds)
        if expected is not None:
            return f"an object whose {key!r} is {expected}"
    return None


_STAGES = frozenset(("stem", *(f"stage{n}" for n in range(1, 33))))

KINDS: Mapping[str, Kind] = {
    "flag": _flag,
    "size": _size,
    "sizes": each_of(_size),
    "depth": _depth,
    "depths": _depths,
    "count": _count,
    "position": _position,
    "extent": either(_extent, each_of(_extent, lambda _: 3)),
    "token": either(_token, each_of(_token, lambda _: 64)),
    "fraction": _fraction,
    "real": _real,
    "nothing": _nothing,
    "names": _names,
    "labels": _labels,
    "label_numbers": _label_numbers,
    "rope": _rope,
    "activation": one_of(ACTIVATIONS),
    "dtype": one_of({"float32", "float64", "float16", "bfloat16"}),
    "problem": one_of({"regression", "single_label_classification", "multi_label_classification"}),
    "summary": one_of({"last", "first", "mean", "cls_index", "attn"}),
    "feed_forward": one_of({"relu", "gelu", "silu", "gated-relu", "gated-gelu", "gated-silu"}),
    "residual": one_of({"basic", "bottleneck"}),
    "layers": each_of(one_of({"full_attention", "sliding_attention"})),
    "stages": each_of(one_of(_STAGES)),
    "stage_numbers": each_of(_stage_number),
}
"""Kinds by the names that the tables use."""
