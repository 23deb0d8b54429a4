"""From a model to its weights, channel units and groups. Knows nothing of sparsity."""

from .couple import couple
from .coupling import STAYS, Contraction, Coupling, Group, Kept, Node, Norm, Producer, Touch, Trace, Weight
from .slim import slim_module

__all__ = [
    "STAYS",
    "Contraction",
    "Coupling",
    "Group",
    "Kept",
    "Node",
    "Norm",
    "Producer",
    "Touch",
    "Trace",
    "Weight",
    "couple",
    "slim_module",
]
