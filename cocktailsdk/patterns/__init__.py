"""Families of masks. One file a pattern; new ones register themselves by name."""

from .base import DENSE, UMG, Pattern, Subnet
from .block import Block, Vector
from .channel import Channel
from .depth import Depth
from .experts import Experts
from .generation import in_order, make_all_masks, rounds_of
from .heads import Heads
from .layers import Layers
from .mlp import MLP
from .nm import NM
from .product import Product
from .registry import make_pattern, parse_pattern, pattern_class, register_pattern, registered, resolve_patterns
from .transposable import Transposable
from .unstructured import Unstructured

__all__ = [
    "DENSE",
    "MLP",
    "NM",
    "UMG",
    "Block",
    "Channel",
    "Depth",
    "Experts",
    "Heads",
    "Layers",
    "Pattern",
    "Product",
    "Subnet",
    "Transposable",
    "Unstructured",
    "Vector",
    "in_order",
    "make_all_masks",
    "make_pattern",
    "parse_pattern",
    "pattern_class",
    "register_pattern",
    "registered",
    "resolve_patterns",
    "rounds_of",
]
