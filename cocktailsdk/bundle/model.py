"""The model that a bundle was made from: its tensors, how it is built as an adapter recorded, and compared."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import AdapterError, BundleError
from ..io.limits import MAX_BUILT_TENSORS, MAX_FLEETING_BYTES, max_modules
from ..io.tensors import TensorFile
from ..io.values import items, more, quoted, shortened
from ..models import rebuilt
from ..records import Bounds

__all__ = ["all_tensors", "built", "check_model", "fingerprint", "stored_as", "stored_names"]


def all_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters, then buffers, each tensor once, by the first of its names."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def stored_names(model: nn.Module) -> list[str]:
    """Those of :func:`all_tensors` that a checkpoint holds."""
    # Private (torch 2.14). state_dict() would tell too, but it runs hooks of the user's model.
    fleeting = {
        f"{path}.{name}".lstrip(".") for path, m in model.named_modules() for name in m._non_persistent_buffers_set
    }
    return [n for n in all_tensors(model) if n not in fleeting]


def fingerprint(model: nn.Module) -> str:
    """A hash of the names, shapes and dtypes of a model's tensors."""
    rows = [[n, list(t.shape), str(t.dtype)] for n, t in sorted(all_tensors(model).items())]
    return hashlib.sha256(json.dumps(rows, separators=(",", ":")).encode()).hexdigest()


def stored_as(dtype: torch.dtype, stored: torch.dtype | None) -> torch.dtype:
    """What a parameter of some dtype is stored in."""
    smaller = stored is not None and dtype.is_floating_point and dtype.itemsize > stored.itemsize
    return stored if stored is not None and smaller else dtype


def built(meta: Mapping[str, Any], weights: TensorFile, trust: bool = False) -> nn.Module:
    """The model, with random weights.

    The record is checked before a model library is imported. The model is built without memory first: what does not
    have the bundle's tensors is never given any.

    Args:
        meta: What ``bundle.json`` holds.
        weights: The dense weights, whose shapes bound the record's integers.
        trust: Whether the record may name classes that are not listed.

    Raises:
        BundleError: No adapter recorded how it is built, the record is refused, or what is built here is another.
    """
    record = meta.get("build")
    if record is None:
        made_from = quoted(meta["model"]["class"]).strip("'")
        raise BundleError(
            f"the bundle does not say how its {made_from} is built, since no adapter knew: pass the model, as in "
            "from_pretrained(bundle, model)"
        )
    count = len(items(meta["model"]["tensors"], "the model's tensors"))
    if count > MAX_BUILT_TENSORS:
        raise BundleError(
            f"the bundle's model has {count} tensors, and at most {MAX_BUILT_TENSORS} are built from a record; "
            "pass the model: from_pretrained(bundle, model)"
        )
    most = max_modules(count)
    bounds = Bounds.of(weights.shapes.values())
    try:
        outline = rebuilt(record, "meta", most, bounds=bounds, trust=trust)
        check_model(str(meta["model"]["class"]), outline, weights.shapes)
        stored = set(stored_names(outline))
        fleeting = sum(t.numel() * t.element_size() for n, t in all_tensors(outline).items() if n not in stored)
        if fingerprint(outline) != meta["model"]["fingerprint"] or fleeting > MAX_FLEETING_BYTES:
            raise AdapterError("what is built has other tensors; pass the model, or use the versions in its provenance")
        return rebuilt(record, most_modules=most, bounds=bounds, trust=trust)
    except AdapterError as e:
        raise BundleError(f"the bundle's model cannot be built here: {shortened(e)}") from e


def check_model(made_from: str, model: nn.Module, found: Mapping[str, tuple[int, ...]]) -> None:
    """Compare a model's stored tensors with those of a file.

    Raises:
        BundleError: They have other names or shapes.
    """
    tensors = all_tensors(model)
    want = {n: tuple(tensors[n].shape) for n in stored_names(model)}
    missing = [n for n in found if n not in want]
    extra = [n for n in want if n not in found]
    other = [n for n in want if n in found and want[n] != found[n]]
    problems = []
    made_from = quoted(made_from).strip("'")
    if other:
        problems.append(f"{other[0]!r} has shape {want[other[0]]}, in the bundle {found[other[0]]}" + more(other))
    if missing:
        problems.append(f"the bundle has {quoted(missing[0])}, which the model lacks" + more(missing))
    if extra:
        problems.append(f"the model has {extra[0]!r}, which the bundle lacks" + more(extra))
    if problems:
        raise BundleError(
            f"the bundle was made from another model ({made_from}) than this {type(model).__name__}: "
            f"{'; '.join(problems)}; build the model with the same arguments"
        )
