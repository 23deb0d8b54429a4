"""One small function for each kind of op; importing this package registers them all."""

from . import (  # noqa: F401, imported for the rules that they register
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
from .registry import RULES, Context, Result, rule

__all__ = ["RULES", "Context", "Result", "rule"]
