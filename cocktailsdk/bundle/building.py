"""The model that a bundle was made from: built as an adapter recorded, and compared."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ..errors import AdapterError, BundleError
from ..io.limits import MAX_BUILT_TENSORS, MAX_FLEETING_BYTES, max_modules
from ..io.safetensors_reader import TensorFile
from ..io.values import items, more, quoted, shortened
from ..models import rebuilt
from ..records import Bounds
from .model import all_tensors, fingerprint, stored_names

__all__ = ["built", "check_model"]


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
