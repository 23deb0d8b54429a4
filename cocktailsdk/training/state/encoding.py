"""How parts of a run are stored: masks as compressed bytes, states as plain values and tensors of their own memory."""

from __future__ import annotations

import json
import zlib
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...errors import BundleError
from ...io.limits import MAX_JSON_BYTES
from ...io.values import integer, items, keyed, parse
from ...masks import Mask, encoder
from ...net.subnet_model import SubnetModel

__all__ = ["decode_masks", "encode_masks", "plain", "to_cpu", "written_before"]

ENCODED = "encoded"
"""The key of a run's masks, whose one tensor holds them all."""


def encode_masks(
    net: SubnetModel, masks: Mapping[str, Mask], base: Mapping[str, Mask] | None = None
) -> dict[str, Tensor]:
    """Masks as one tensor of bytes; no tensor for no masks.

    Compressed by zlib are a line of JSON, with the encoder's entries, and its packed tensors one after another.

    Args:
        net: The networks.
        masks: Some of its masks, by name.
        base: Masks that :func:`decode_masks` will get: of a nested mask only the cells that the one before it keeps are
            written then.
    """
    if not masks:
        return {}
    entries, tensors = encoder.encode_masks(net.patterns, masks, net.coupling, net.eligible, base)
    sizes = [tensors[e["tensor"]].numel() for e in entries if "tensor" in e]
    head = json.dumps({"entries": entries, "sizes": sizes}, separators=(",", ":")).encode()
    # Packed bits hardly ever repeat, so a search for repetitions finds nothing and is slow. Huffman codes alone gain
    # what is to be gained: of a mask that drops a fifth of the weights a byte takes 5.9 bits.
    compressor = zlib.compressobj(level=1, strategy=zlib.Z_HUFFMAN_ONLY)
    parts = [head, b"\n", *(tensors[e["tensor"]].numpy().tobytes() for e in entries if "tensor" in e)]
    data = b"".join(compressor.compress(part) for part in parts) + compressor.flush()
    return {ENCODED: torch.frombuffer(bytearray(data), dtype=torch.uint8)}


def decode_masks(
    tensors: Mapping[str, Tensor], net: SubnetModel, base: Mapping[str, Mask] | None = None
) -> dict[str, Mask]:
    """The inverse of :func:`encode_masks`; reads what older releases wrote, too.

    Args:
        tensors: What it returned.
        net: The networks.
        base: The masks that it got, and perhaps others.

    Raises:
        BundleError: The tensors hold no masks of the net.
    """
    if not tensors:
        return {}
    if written_before(tensors):
        return _decode_plain(tensors, net)
    if tensors.keys() != {ENCODED} or tensors[ENCODED].dtype != torch.uint8 or tensors[ENCODED].ndim != 1:
        raise BundleError(f"masks are {', '.join(sorted(map(str, tensors))[:3])}, not one tensor of bytes, {ENCODED!r}")
    head, _, packed = _decompressed(tensors[ENCODED], net).partition(b"\n")
    try:
        said = keyed(parse(head), "its masks", ("entries", "sizes"))
    except (ValueError, RecursionError) as error:
        raise BundleError(f"the description of the masks is no JSON ({error})") from error
    named = [e["tensor"] for e in items(said["entries"], "its masks") if isinstance(e, dict) and "tensor" in e]
    sizes = [integer(n, "the bytes of a mask") for n in items(said["sizes"], "the bytes of its masks", len(named))]
    if sum(sizes) != len(packed):
        raise BundleError(f"masks have {len(packed)} bytes, not {sum(sizes)}")
    data = torch.from_numpy(np.frombuffer(bytearray(packed), np.uint8))  # torch.frombuffer refuses an empty buffer
    found = dict(zip(map(str, named), data.split(sizes), strict=True))
    return encoder.decode_masks(
        said["entries"], found.__getitem__, net.names[1:], net.coupling, net.eligible, base=base or {}
    )


def _decompressed(data: Tensor, net: SubnetModel) -> bytes:
    # a cell takes one byte at most, and a subnetwork has a cell for each element and unit at most
    most = (sum(map(prod, net.coupling.shapes.values())) + net.coupling.n_units) * len(net.names) + MAX_JSON_BYTES
    decompressor = zlib.decompressobj()
    try:
        out = decompressor.decompress(data.numpy().tobytes(), most)
    except zlib.error as error:
        raise BundleError(f"masks cannot be decompressed ({error})") from error
    if not decompressor.eof or decompressor.unused_data:
        raise BundleError("masks are cut off, or too large to be the net's")
    return out


def written_before(tensors: Mapping[str, Tensor]) -> bool:
    """Whether masks are in the form of release 0.1.0: a bool tensor each, by ``NAME/elements/PARAMETER``."""
    return any("/" in str(key) for key in tensors)


def _decode_plain(tensors: Mapping[str, Tensor], net: SubnetModel) -> dict[str, Mask]:
    place = {weight.name: i for i, weight in enumerate(net.eligible)}
    elements: dict[str, dict[str, Tensor]] = {}
    removed: dict[str, Tensor] = {}
    for key in sorted(tensors, key=lambda k: place.get(k.split("/", 2)[-1], len(place))):
        name, kind, *parameter = key.split("/", 2)
        if kind == "removed":
            removed[name] = tensors[key]
        elif kind == "elements":
            elements.setdefault(name, {})[parameter[0]] = tensors[key]
        else:  # "nothing": a mask that masks nothing
            elements.setdefault(name, {})
    return {name: Mask(elements.get(name, {}), removed.get(name)) for name in sorted({*elements, *removed})}


def to_cpu(value: Any) -> Any:
    """A copy of nested containers with copies of their tensors on the CPU."""
    return _mapped(value, lambda v: v.detach().to("cpu", copy=True) if isinstance(v, Tensor) else v)


def plain(value: Any) -> Any:
    """Nested containers with NumPy's numbers as Python's, which need no code to be read; tensors are not copied."""
    return _mapped(value, lambda v: v.item() if isinstance(v, np.generic) else v)


def _mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(value, Mapping):
        new = {k: _mapped(v, change) for k, v in value.items()}
        return type(value)(new) if isinstance(value, Counter | OrderedDict) else new
    if type(value) in (list, tuple):
        return type(value)(_mapped(v, change) for v in value)
    return change(value)
