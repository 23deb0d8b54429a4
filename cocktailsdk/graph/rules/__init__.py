"""One small function for each kind of op; importing this package registers them all."""

from . import (
    contraction,
    einsum,
    elementwise,
    experts,
    movement,
    mutation,
    norm,
    placement,
    recurrent,
    reduction,
    spectral,
)
from .registry import RULES, Context, Product, Result, WeightUse, rule

__all__ = [
    "RULES",
    "Context",
    "Product",
    "Result",
    "WeightUse",
    "contraction",
    "einsum",
    "elementwise",
    "experts",
    "movement",
    "mutation",
    "norm",
    "placement",
    "recurrent",
    "reduction",
    "rule",
    "spectral",
]
