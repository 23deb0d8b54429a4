"""From a model to its weights, channel units and groups. Knows nothing of sparsity."""

from .coupling import (
    EXCLUDED,
    STAYS,
    Branch,
    Contraction,
    Coupling,
    Group,
    Kept,
    Link,
    Node,
    Norm,
    Producer,
    Scale,
    Stay,
    Touch,
    Trace,
    Weight,
)
from .obstacles import obstacles
from .prove import couple
from .slim import slim_module

__all__ = [
    "EXCLUDED",
    "STAYS",
    "Branch",
    "Contraction",
    "Coupling",
    "Group",
    "Kept",
    "Link",
    "Node",
    "Norm",
    "Producer",
    "Scale",
    "Stay",
    "Touch",
    "Trace",
    "Weight",
    "couple",
    "obstacles",
    "slim_module",
]
