"""Where a bundle comes from, as JSON values."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Mapping
from typing import Any

import torch

from ..errors import BundleError
from ..version import __version__

__all__ = ["completed"]


def completed(given: Mapping[str, Any]) -> dict[str, Any]:
    """What is known of a net's making, with the versions it was made with where nobody has named them.

    Nothing of the moment and of the machine is in it: a run that was stopped and went on must write the same bytes as
    one that never was.

    Raises:
        BundleError: It holds something else than JSON values.
    """
    versions = {"cocktailsdk": __version__, "torch": str(torch.__version__), "python": platform.python_version()}
    complete = {"versions": versions, **given}
    if not _is_json(complete):
        raise BundleError(f"net.provenance must hold JSON values with texts as keys, and holds {dict(given)!r:.200}")
    return {key: json.loads(json.dumps(value)) for key, value in sorted(complete.items())}


def _is_json(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(k, str) and _is_json(v) for k, v in value.items())
    if isinstance(value, list | tuple):
        return all(map(_is_json, value))
    return value is None or isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value))
