"""Bundles: many networks in about the bytes of one.

A bundle is a folder of three files, none of which can run code:

- ``weights.safetensors``: the dense network, by its own names, as any checkpoint.
- ``subnets.safetensors``: packed masks, unit numbers, and batch-norm statistics of each subnetwork.
- ``bundle.json``: format version, patterns, subnets, metrics, coupling, and checksums of all three files.

Nothing in it depends on the clock: saving twice gives the same bytes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..moved import moved_names
from .files import bundle_bytes

if TYPE_CHECKING:
    from .read import load_bundle as load_bundle
    from .write import save_bundle as save_bundle

__all__ = ["bundle_bytes", "load_bundle", "save_bundle"]

__getattr__ = moved_names(
    __name__,
    {"from_pretrained": "cocktailsdk.from_pretrained", "save_pretrained": "cocktailsdk.bundle.save_bundle"},
    late={"load_bundle": ".read", "save_bundle": ".write"},  # a bundle can be listed without loading torch
)
