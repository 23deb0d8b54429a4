"""Bundles: many networks in about the bytes of one.

A bundle is a folder of three files, none of which can run code:

- ``weights.safetensors``: the dense network, by its own names, as any checkpoint.
- ``subnets.safetensors``: packed masks, unit numbers, and batch-norm statistics of each subnetwork.
- ``bundle.json``: format version, patterns, subnets, metrics, coupling, and checksums of all three files.

Nothing in it depends on the clock: saving twice gives the same bytes.
"""

from .files import bundle_bytes
from .read import from_pretrained
from .write import save_pretrained

__all__ = ["bundle_bytes", "from_pretrained", "save_pretrained"]
