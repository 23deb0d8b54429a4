"""From a net to a bundle, once its masks are what its patterns make."""

from __future__ import annotations

import json
import logging
import math
import platform
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import BundleError, PatternError
from ..io.limits import MAX_EXAMPLE_ELEMENTS, MAX_EXAMPLE_VALUES
from ..io.values import more
from ..masks import Mask
from ..masks.encoder import decode_masks, encode_masks
from ..models import best_record
from ..net.subnet_model import SubnetModel
from ..patterns import DENSE, UMG, Pattern, Subnet
from ..utils.fsdp import is_main, plain_class
from ..version import __version__
from .couplings import write_coupling
from .examples import describe, elements, values
from .files import write_folder
from .model import all_tensors, fingerprint, stored_as, stored_names
from .private import write_private
from .statistics import write_statistics

log = logging.getLogger(__name__)


def save_bundle(net: SubnetModel, path: str | PathLike[str], *, dtype: torch.dtype | str | None = None) -> None:
    """Write a net's bundle: the dense weights, whatever subnetwork is active. Two calls write the same bytes.

    Of a net whose weights are sharded (FSDP2) all processes must call this; the first of them writes.

    Args:
        net: The net.
        path: The folder.
        dtype: ``torch.float16`` or ``torch.bfloat16`` to store parameters of more bits in these, rounded to the
            nearest, private tensors like the parameters that they replace; masks, buffers and statistics are stored
            exactly all the same, and metrics stay those of the weights before.

    Raises:
        BundleError: A subnetwork has no mask yet, the folder holds something else, or a weight is too large for
            float16.
    """
    stored = _storage(dtype)
    net._check_structure()
    names = [n for n in net.names if n != DENSE]
    missing = [n for n in names if n not in net.masks]
    if missing:
        raise BundleError(
            f"{missing[0]} has no mask{more(missing)}: finish training, or load all of the bundle, before saving"
        )
    _check_given(net)
    masks, tensors = net.masks, all_tensors(net.model)
    table = list(tensors)
    advice = "set one that it makes, net.set_mask(name, net.make_masks(name)), or register a pattern of your own"
    check_masks(net.patterns, masks, net.umg(), advice)
    coupling_meta, units = write_coupling(net.coupling, table)
    mask_entries, packed = encode_masks(net.patterns, masks, net.coupling, net.eligible)
    again = decode_masks(mask_entries, packed.__getitem__, names, net.coupling, net.eligible)
    broken = [n for n in names if not same_mask(masks[n], again[n])]
    if broken:
        raise BundleError(f"the masks of {', '.join(broken)} cannot be packed: report this with the pattern's code")
    statistics, measured = write_statistics(net.statistics, names, masks, net.coupling)
    meta = {
        "model": {
            "class": plain_class(net.model).__qualname__,
            "fingerprint": fingerprint(net.model),
            "tensors": table,
        },
        "build": _build(net.model),
        "stored": None if stored is None else str(stored).removeprefix("torch."),
        "provenance": _provenance(net.provenance),
        "patterns": [{"name": p.name, "config": p.config()} for p in net.patterns],
        "subnets": [{**row(net.subnet(n)), **_metric(net, n)} for n in net.names],
        "selection": {
            "target": net.selection.target,
            "exclude": net.selection.exclude,
            "whole": sorted(net.selection.whole),
            "eligible": [table.index(w.name) for w in net.eligible],
        },
        "example": _example(net),
        "masks": mask_entries,
        "statistics": statistics,
        "dense_statistics": DENSE in net.statistics,
        "coupling": coupling_meta,
    }
    private, owned = write_private(_plain_private(net, stored), names, masks, net.coupling, table)
    if private:  # without any the bundle is of the version before, and the same bytes
        meta["private"] = private
    parameters = dict(net.model.named_parameters())
    weights = {}
    for n in stored_names(net.model):
        weights[n] = _plain(n, net.dense_tensor(n), stored if n in parameters else None)
    if is_main(net.model):
        write_folder(path, meta, weights, {**packed, **measured, **owned, "units": units})


def check_masks(patterns: Sequence[Pattern], masks: Mapping[str, Mask], umg: UMG, advice: str) -> None:
    """See that every mask is one that its pattern makes; a right checksum says nothing of that.

    Args:
        patterns: The patterns.
        masks: By subnetwork; those that are missing are not checked.
        umg: The coupling, the eligible weights and the dense values.
        advice: What to do about a wrong one.

    Raises:
        BundleError: One is not; names the subnetwork.
    """
    for pattern in patterns:
        for subnet in pattern.subnets():
            if subnet.name in masks:
                _check(pattern, subnet, masks[subnet.name], umg, advice)


def _check(pattern: Pattern, subnet: Subnet, mask: Mask, umg: UMG, advice: str) -> None:
    try:
        pattern.check(subnet, mask, umg)
    except PatternError as error:
        exact = _before_rounding(pattern, subnet)
        if exact is None:
            raise BundleError(f"{error}; {advice}") from error
        try:
            pattern.check(exact, mask, umg)
        except PatternError:
            raise BundleError(f"{error}; {advice}") from error


def _before_rounding(pattern: Pattern, subnet: Subnet) -> Subnet | None:
    """The default level of a subnetwork's name.

    ``finetune`` of release 0.1.0 recorded the sparsity that is in the name, with three decimals; the mask has the exact
    one.
    """
    if len(pattern.subnets()) > 1:
        return None
    try:
        levels = type(pattern)().subnets()
    except (TypeError, PatternError):  # a pattern that needs arguments has no default levels
        return None
    return next((s for s in levels if s.name == subnet.name and s.sparsity != subnet.sparsity), None)


def _build(model: nn.Module) -> dict[str, Any] | None:
    """How the model is built, and a line in the log where the bundle will not load by that alone."""
    record, reason = best_record(model)
    if reason is not None:
        how = "from_pretrained(bundle, model)"
        how += "" if record is None else " or from_pretrained(bundle, trust_build_record=True)"
        log.info("the bundle will not build its %s by itself: %s; load it with %s", type(model).__name__, reason, how)
    return record


def row(subnet: Subnet) -> dict[str, Any]:
    """A subnetwork as a bundle lists it."""
    entry: dict[str, Any] = {"name": subnet.name, "pattern": subnet.pattern, "sparsity": subnet.sparsity}
    if subnet.options:
        entry["options"] = dict(subnet.options)
    return entry


def same_mask(a: Mask, b: Mask) -> bool:
    """Whether two masks are equal."""
    if set(a.elements) != set(b.elements) or (a.removed is None) != (b.removed is None):
        return False
    if a.removed is not None and b.removed is not None and not torch.equal(a.removed, b.removed):
        return False
    if set(a.experts) != set(b.experts) or not all(torch.equal(k, b.experts[n]) for n, k in a.experts.items()):
        return False
    return all(torch.equal(k, b.elements[n]) for n, k in a.elements.items())


def _storage(dtype: torch.dtype | str | None) -> torch.dtype | None:
    if dtype is None:
        return None
    known = {str(d).removeprefix("torch."): d for d in (torch.float16, torch.bfloat16)}
    found = known.get(str(dtype).removeprefix("torch."))
    if found is None:
        raise BundleError(f"weights are stored as they are, or as {' or '.join(known)}, not as {dtype}")
    return found


def _check_given(net: SubnetModel) -> None:
    """What people may have put into a net's statistics and metrics fits it."""
    known = {n: tuple(b.shape) for n, b in net.model.named_buffers()}
    for of, own in net.statistics.items():
        wrong = [b for b, t in own.items() if known.get(b) != tuple(t.shape)]
        if of not in net.names or wrong:
            raise BundleError(
                f"net.statistics has an entry for {of!r} that fits no buffer: {', '.join(wrong[:3]) or of}"
            )
    unknown = [n for n in net.metrics if n not in net.names]
    if unknown:
        raise BundleError(f"net.metrics names no subnet: {', '.join(unknown)}")


def _metric(net: SubnetModel, name: str) -> dict[str, Any]:
    if name not in net.metrics:
        return {}
    value = float(net.metrics[name])
    return {"metric": value if math.isfinite(value) else str(value)}


def _provenance(given: Mapping[str, Any]) -> dict[str, Any]:
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


def _plain(name: str, t: Tensor, stored: torch.dtype | None) -> Tensor:
    # A file holds no views: each tensor gets memory of its own, in row-major order.
    own = t.detach().to("cpu").clone(memory_format=torch.contiguous_format)
    small = own.to(stored_as(own.dtype, stored))
    if small.dtype == torch.float16 and bool((small.isinf() & own.isfinite()).any()):
        raise BundleError(
            f"{name} has values up to {float(own[own.isfinite()].abs().max()):.3g}, beyond float16's 65504: store "
            "bfloat16, or the weights as they are"
        )
    return small


def _plain_private(net: SubnetModel, stored: torch.dtype | None) -> dict[str, dict[str, Tensor]]:
    """Private tensors as they are stored: in the parameters' dtypes, which may be others than when they were set."""
    dtypes = {n: p.dtype for n, p in net.model.named_parameters()}
    return {s: {n: _plain(n, t.to(dtypes[n]), stored) for n, t in own.items()} for s, own in net.private.items()}


def _example(net: SubnetModel) -> Any:
    if net.example is None:
        return None
    try:
        spec = describe((tuple(net.example[0]), dict(net.example[1])))
    except BundleError:
        return None  # the bundle serves without; only slim asks for them
    fits = elements(spec) <= MAX_EXAMPLE_ELEMENTS and values(spec) <= MAX_EXAMPLE_VALUES
    return spec if fits else None
