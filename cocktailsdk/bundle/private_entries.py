"""What ``bundle.json`` says of private tensors. Nothing here loads torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import BundleError
from ..io.values import integer, items, keyed, quoted, text
from .files import VERSION_PRIVATE

__all__ = ["PRIVATE_SIZES", "listed_private", "private_bytes"]

PRIVATE_SIZES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}
"""The dtypes of private tensors, and the bytes of an element."""


def listed_private(meta: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The private tensors as ``bundle.json`` lists them: subnetwork, dtype, place, and the parameters' places.

    Raises:
        BundleError: A value makes no sense.
    """
    if meta["format_version"] < VERSION_PRIVATE:
        return []
    what = "an entry of its private tensors"
    listed = items(meta.get("private"), "its private tensors")
    for row in listed:
        entry = keyed(row, what, ("subnet", "dtype", "start", "count", "parameters"))
        if text(entry["dtype"], what) not in PRIVATE_SIZES:
            raise BundleError(f"the bundle has private tensors of {quoted(entry['dtype'])}, which is not known")
        text(entry["subnet"], what)
        integer(entry["start"], "where private tensors begin")
        integer(entry["count"], "how many private values there are")
        items(entry["parameters"], "the parameters of private tensors")
    return listed


def private_bytes(meta: Mapping[str, Any]) -> dict[str, int]:
    """Bytes of the private tensors in the bundle, by subnetwork; of those without nothing is said.

    Raises:
        BundleError: As of :func:`listed_private`.
    """
    out: dict[str, int] = {}
    for entry in listed_private(meta):
        size = entry["count"] * PRIVATE_SIZES[entry["dtype"]]
        out[entry["subnet"]] = out.get(entry["subnet"], 0) + size
    return out
