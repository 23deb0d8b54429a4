"""From a net to a bundle."""

from __future__ import annotations

import hashlib
import json
import math
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import BundleError
from ..masks import Mask
from ..net import CocktailNet
from ..patterns import DENSE
from ..sharding import is_main, plain_class
from .couplings import write_coupling
from .examples import describe
from .files import write_folder
from .subnets import read_masks, write_masks, write_statistics


def save_pretrained(net: CocktailNet, path: str | PathLike[str]) -> None:
    """Write a net's bundle: the dense weights, whatever subnetwork is active. Two calls write the same bytes.

    Of a net whose weights are sharded (FSDP2) all processes must call this; the first of them writes.

    Raises:
        BundleError: A subnetwork has no mask yet, or the folder holds something else.
    """
    names = [n for n in net.names if n != DENSE]
    missing = [n for n in names if n not in net.masks]
    if missing:
        raise BundleError(f"{', '.join(missing)} have no mask yet; finish training before saving")
    masks = net.masks
    tensors = all_tensors(net.model)
    weights = {n: _plain(net.dense_tensor(n)) for n in stored_names(net.model)}
    table = list(tensors)
    coupling_meta, units = write_coupling(net.coupling, table)
    mask_entries, packed = write_masks(net.patterns, masks, net.coupling, net.eligible)
    again = read_masks(mask_entries, packed.__getitem__, names, net.coupling, net.eligible)
    broken = [n for n in names if not same_mask(masks[n], again[n])]
    if broken:
        raise BundleError(f"the masks of {', '.join(broken)} cannot be packed: report this with the pattern's code")
    known = {n: tuple(b.shape) for n, b in net.model.named_buffers()}
    for of, own in net.statistics.items():
        wrong = [b for b, t in own.items() if known.get(b) != tuple(t.shape)]
        if of not in net.names or wrong:
            raise BundleError(
                f"net.statistics has an entry for {of!r} that fits no buffer: {', '.join(wrong[:3]) or of}"
            )
    statistics, measured = write_statistics(net.statistics, names, masks, net.coupling)
    unknown = [n for n in net.metrics if n not in net.names]
    if unknown:
        raise BundleError(f"net.metrics names no subnet: {', '.join(unknown)}")
    subnets = []
    for n in net.names:
        s = net.subnet(n)
        entry: dict[str, Any] = {"name": n, "pattern": s.pattern, "sparsity": s.sparsity}
        if s.options:
            entry["options"] = dict(s.options)
        if n in net.metrics:
            value = float(net.metrics[n])
            entry["metric"] = value if math.isfinite(value) else str(value)
        subnets.append(entry)
    meta = {
        "model": {
            "class": plain_class(net.model).__qualname__,
            "fingerprint": fingerprint(net.model),
            "tensors": table,
        },
        "patterns": [{"name": p.name, "config": p.config()} for p in net.patterns],
        "subnets": subnets,
        "selection": {"target": net.selection.target, "exclude": net.selection.exclude},
        "example": _example(net),
        "masks": mask_entries,
        "statistics": statistics,
        "dense_statistics": DENSE in net.statistics,
        "coupling": coupling_meta,
    }
    if is_main(net.model):
        write_folder(path, meta, weights, {**packed, **measured, "units": units})


def all_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters, then buffers, each tensor once, by the first of its names."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def stored_names(model: nn.Module) -> list[str]:
    """Those of :func:`all_tensors` that a checkpoint holds."""
    fleeting = {
        f"{path}.{name}".lstrip(".") for path, m in model.named_modules() for name in m._non_persistent_buffers_set
    }
    return [n for n in all_tensors(model) if n not in fleeting]


def fingerprint(model: nn.Module) -> str:
    """A hash of the names, shapes and dtypes of a model's tensors."""
    rows = [[n, list(t.shape), str(t.dtype)] for n, t in sorted(all_tensors(model).items())]
    return hashlib.sha256(json.dumps(rows, separators=(",", ":")).encode()).hexdigest()


def same_mask(a: Mask, b: Mask) -> bool:
    """Whether two masks are equal."""
    if set(a.elements) != set(b.elements) or (a.removed is None) != (b.removed is None):
        return False
    if a.removed is not None and b.removed is not None and not torch.equal(a.removed, b.removed):
        return False
    return all(torch.equal(k, b.elements[n]) for n, k in a.elements.items())


def _plain(t: Tensor) -> Tensor:
    # A file holds no views: each tensor gets memory of its own, in row-major order.
    return t.detach().to("cpu").clone(memory_format=torch.contiguous_format)


def _example(net: CocktailNet) -> Any:
    if net.example is None:
        return None
    try:
        return describe((tuple(net.example[0]), dict(net.example[1])))
    except BundleError:
        return None  # the bundle serves without; only slim asks for them
