"""A build record against the tables, as raw JSON: no model library is imported."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import AdapterError
from .kinds import Bounds, shown
from .tables import LIBRARIES, PASS, Entry, library
from .trusted import check_trusted

__all__ = ["check_record"]

_PARTS = {"timm": ("name", "options"), "torchvision": ("name", "options"), "transformers": ("class", "config")}
"""Keys of a record: what is built, and its arguments."""

_DTYPES = ("float32", "float64", "float16", "bfloat16")


def check_record(said: Any, bounds: Bounds, *, trust: bool = False) -> None:
    """Refuse a build record that asks for what is not listed.

    Args:
        said: ``adapter``, ``record`` and ``dtype``, as a bundle holds them.
        bounds: What the bundle's tensors allow.
        trust: Whether classes are allowed that are not listed. Their arguments are then checked by their form.

    Raises:
        AdapterError: Names the class or the argument, and says to pass the model.
    """
    _keys(said, ("adapter", "record", "dtype"), "the build record")
    adapter, record, dtype = said["adapter"], said["record"], said["dtype"]
    if type(adapter) is not str or adapter not in LIBRARIES:
        raise AdapterError(
            f"no adapter {shown(adapter)} builds models of bundles: only those of {', '.join(LIBRARIES)} do; {PASS}"
        )
    if type(dtype) is not str or dtype not in _DTYPES:
        raise AdapterError(f"the build record's dtype is {shown(dtype)}, not one of {', '.join(_DTYPES)}; {PASS}")
    what, payload = _PARTS[adapter]
    _keys(record, (what, payload), "the build record")
    name, values = record[what], record[payload]
    if type(name) is not str or type(values) is not dict:
        raise AdapterError(f"the build record's {what!r} is {shown(name)}, and its {payload!r} {shown(values)}; {PASS}")
    entry = library(adapter).entries.get(name)
    if entry is not None:
        _fields(values, entry, bounds, name)
    elif trust:
        check_trusted(adapter, name, values, bounds)
    else:
        raise AdapterError(
            f"no model class {shown(name)} of {adapter} is among those that a bundle may have built; {PASS}, or if you "
            "trust whoever made the bundle, from_pretrained(bundle, trust_build_record=True)"
        )


def _keys(value: Any, needed: tuple[str, ...], what: str) -> None:
    if type(value) is not dict:
        raise AdapterError(f"{what} is {shown(value)}, not an object of {', '.join(needed)}; {PASS}")
    missing, odd = sorted(set(needed) - value.keys()), sorted(value.keys() - set(needed))
    if missing or odd:
        problem = f"lacks {shown(missing[0])}" if missing else f"has {shown(odd[0])}"
        raise AdapterError(f"{what} {problem}, and should be an object of {', '.join(needed)}; {PASS}")


def _fields(values: Mapping[str, Any], entry: Entry, bounds: Bounds, where: str) -> None:
    """Refuse arguments that are not listed, or are of another kind."""
    for key, value in values.items():
        inner = entry.nested.get(key)
        if inner is not None and value is not None:
            if type(value) is not dict:
                raise AdapterError(f"{where} has {shown(value)} for {key!r}, not an object; {PASS}")
            # Releases before 0.2 wrote this key of inner configurations, always empty.
            inside = value.items()
            _fields({k: v for k, v in inside if (k, v) != ("_name_or_path", "")}, inner, bounds, f"{where}.{key}")
        elif inner is None and key not in entry.fields:
            raise AdapterError(f"{where} has {shown(key)}, which is not among its listed arguments; {PASS}")
        elif inner is None and value is not None:
            wanted = entry.fields[key](value, bounds)
            if wanted is not None:
                raise AdapterError(f"{where} has {shown(value)} for {key!r}, not {wanted}; {PASS}")
