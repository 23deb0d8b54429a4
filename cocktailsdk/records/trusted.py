"""Arguments of classes that no table lists, in a bundle whose maker the user trusts: checked by their form.

Trust widens the classes alone. Names of repositories, files, kernels and code stay refused, at any depth.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ..errors import AdapterError
from .kinds import KINDS, MOST_POSITIONS, Bounds, number, shown
from .tables import PASS, library

__all__ = ["check_trusted"]

_NAME = {
    "timm": re.compile(r"[a-z][a-z0-9_]{0,99}"),
    "torchvision": re.compile(r"[a-z][a-z0-9_]{0,99}"),
    "transformers": re.compile(r"[A-Z][A-Za-z0-9]{0,99}"),
}
_KEY = re.compile(r"[a-zA-Z][a-zA-Z0-9_]{0,99}")
_WORD = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9_+-]{0,63})")
"""A string that is no path, no address, and no repository of a user."""

_REFUSED = re.compile(
    r"auto_map|trust|remote|pretrained|checkpoint|quantization|implementation|kernel|backbone|repo|revision"
    r"|hub|url|path|file|folder|dir$|_dir|cache_dir|tokenizer|processor|code_|custom|model_args|model_name|token$"
)
"""Names of arguments that may lead to files, repositories, or code. Numbers and null are harmless in them."""

_LARGE = re.compile(r"token|position|length|window|size|rate|theta|max_|hop|index|ctx|context|period|scalar|seed")
"""Names of integers that may exceed every dimension of a model."""

_COMMON = ("id2label", "label2id", "num_labels", "architectures", "dtype", "torch_dtype", "problem_type")
_DEEPEST = 8
_MOST_VALUES = 100_000
_MOST_INTEGER = 8192


def check_trusted(adapter: str, name: str, values: Mapping[str, Any], bounds: Bounds) -> None:
    """Refuse arguments that lead elsewhere, or are of a form that no configuration needs.

    Raises:
        AdapterError: Names the argument, and says to pass the model.
    """
    if not _NAME[adapter].fullmatch(name):
        raise AdapterError(f"{shown(name)} is no name of a model class or builder of {adapter}; {PASS}")
    if adapter != "transformers":
        some = next(iter(library(adapter).entries.values()))
        for key, value in values.items():
            wanted = some.fields[key](value, bounds) if key in some.fields else "an argument of build records"
            if wanted is not None:
                raise AdapterError(f"{name} has {shown(value)} for {shown(key)}, not {wanted}; {PASS}")
        return
    _Walk(name, bounds).object(values, name, 0)


class _Walk:
    """One pass over the arguments, which counts them."""

    def __init__(self, name: str, bounds: Bounds) -> None:
        self._name, self._bounds, self._seen = name, bounds, 0

    def object(self, values: Mapping[str, Any], where: str, depth: int) -> None:
        """Check an object's keys, and what they hold."""
        for key, value in values.items():
            if (key, value) == ("_name_or_path", "") and depth:
                continue
            if not _KEY.fullmatch(key):
                raise AdapterError(f"{where} has {shown(key)}, which is no public argument; {PASS}")
            if key in _COMMON:
                wanted = None if value is None else _common(key)(value, self._bounds)
                if wanted is not None:
                    raise AdapterError(f"{where} has {shown(value)} for {key!r}, not {wanted}; {PASS}")
                continue
            if _REFUSED.search(key) and _holds_more_than_numbers(value) and not self._inner(key, value):
                raise AdapterError(
                    f"{where} has {shown(value)} for {key!r}, which may name a file, a repository or code; {PASS}"
                )
            self._value(value, key, f"{where}.{key}", depth + 1)

    def _inner(self, key: str, value: Any) -> bool:
        """Whether a value is a configuration inside another, which is checked like its outer one."""
        return key.endswith("_config") and type(value) is dict and "quantization" not in key

    def _value(self, value: Any, key: str, where: str, depth: int) -> None:
        self._seen += 1
        if depth > _DEEPEST or self._seen > _MOST_VALUES:
            raise AdapterError(f"{self._name} has arguments beyond {_DEEPEST} levels or {_MOST_VALUES} values; {PASS}")
        if type(value) is dict:
            self.object(value, where, depth)
        elif type(value) is list:
            for entry in value:
                self._value(entry, key, where, depth + 1)
        elif type(value) is str:
            if value and not _WORD.fullmatch(value):
                raise AdapterError(f"{where} is {shown(value)}, not a plain word; {PASS}")
        elif type(value) is int:
            high = MOST_POSITIONS if _LARGE.search(key) else max(self._bounds.largest, _MOST_INTEGER)
            high = self._bounds.tensors if "layers" in key and not key.startswith("max") else high
            if not -high <= value <= high:
                raise AdapterError(f"{where} is {shown(value)}, beyond {high}; {PASS}")
        elif type(value) is float and not number(value, -1e30, 1e30):
            raise AdapterError(f"{where} is {value!r}, not a finite number; {PASS}")


def _common(key: str) -> Any:
    kinds = {"id2label": "labels", "label2id": "label_numbers", "num_labels": "count", "architectures": "names"}
    return KINDS[kinds.get(key, "dtype" if "dtype" in key else "problem")]


def _holds_more_than_numbers(value: Any) -> bool:
    """Whether a value holds a text, or turns something on."""
    if type(value) is list:
        return any(_holds_more_than_numbers(v) for v in value)
    return type(value) in (dict, str) or value is True
