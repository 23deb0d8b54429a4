"""What a bundle may hold at most: a file that asks for more is refused before anything is made for it.

Each limit is far above what real bundles need.
"""

from __future__ import annotations

MAX_JSON_BYTES = 16 << 20
"""Of ``bundle.json``; that of 24 networks of a ResNet-18 has 30 kB."""

MAX_JSON_VALUES = 1_500_000
"""In ``bundle.json`` and in a header, counted as commas and opening brackets before either is parsed."""

MAX_HEADER_BYTES = 16 << 20
"""Of the header of a safetensors file."""

MAX_TENSORS = 100_000
"""In one safetensors file."""

MAX_DIMS = 32
"""Of one tensor."""

MAX_SUBNETS = 4096
"""Of all patterns together, the dense network included."""

MAX_PIECES = 4096
"""Checksums of one file: pieces grow with the file."""

MAX_EXAMPLE_ELEMENTS = 1 << 25
"""Of all example inputs together; they are made when the bundle is read."""

MAX_EXAMPLE_VALUES = 10_000
"""Tensors, texts, numbers and containers in the example inputs; a tensor without elements is one, too."""

MAX_FIELDS = 32
"""Unit fields of one tensor."""


MAX_FLEETING_BYTES = 1 << 30
"""Of buffers that are not stored, in a model that is built as the bundle says."""


MAX_BUILT_TENSORS = 5_000
"""Of a model that is built as the bundle says: the largest listed models have less than 2,000."""


def max_modules(tensors: int) -> int:
    """In a model of so many tensors, where it is built as the bundle says. Real ones have two for each tensor."""
    return 1_000 + 5 * tensors


def max_coupling_entries(tensors: int) -> int:
    """Entries of all lists of a coupling together, for a model of so many tensors."""
    return 20_000 + 100 * tensors


def max_unit_entries(elements: int) -> int:
    """Of all vectors of unit numbers together, for a model of so many elements."""
    return (1 << 22) + 4 * elements


def max_private_zeros(elements: int) -> int:
    """Masked elements of all private tensors together, which no file holds, for a model of so many elements."""
    return (1 << 22) + 16 * elements
