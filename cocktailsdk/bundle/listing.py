"""What a bundle lists, checked, without loading torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ..errors import BundleError
from ..io.limits import MAX_SUBNETS
from ..io.values import distinct, items, keyed, label, quoted, text

__all__ = ["listed_subnets", "model_class"]


def listed_subnets(meta: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The subnetworks as ``bundle.json`` lists them: name, pattern and sparsity, and options and metric if any.

    Raises:
        BundleError: There are too many, two of one name, or a value that makes no sense.
    """
    listed = items(meta.get("subnets"), "its subnets")
    if len(listed) > MAX_SUBNETS:
        raise BundleError(f"the bundle lists {len(listed)} subnets; at most {MAX_SUBNETS} are read")
    for row in listed:
        entry = keyed(row, "a subnet", ("name", "pattern", "sparsity"), ("options", "metric"))
        text(entry["name"], "a subnet")
        text(entry["pattern"], "the pattern of a subnet")
        if type(entry["sparsity"]) not in (int, float) or not 0 <= entry["sparsity"] <= 1:
            raise BundleError(f"the bundle gives {quoted(entry['sparsity'])} for a sparsity, not a number in [0, 1]")
        options = entry.get("options", {})
        keyed(options, "the options of a subnet", (), options if type(options) is dict else ())
        _check_metric(entry.get("metric", 0.0))
    distinct([row["name"] for row in listed], "its subnets")
    return listed


def model_class(meta: Mapping[str, Any]) -> str:
    """The name of the model's class, for people.

    Raises:
        BundleError: There is none.
    """
    said = keyed(meta.get("model"), "what it says of the model", ("class", "fingerprint", "tensors"))
    return label(said["class"], "the model's class")


def _check_metric(value: Any) -> None:
    finite = type(value) is float and math.isfinite(value)
    finite |= type(value) is int and abs(value) < 2**1023  # as a float it is finite, too
    if not finite and (type(value) is not str or value not in ("nan", "inf", "-inf")):
        raise BundleError(f"the bundle gives {quoted(value)} for a metric")
