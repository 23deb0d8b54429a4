"""From a model to its weights, channel units and groups. Knows nothing of sparsity."""

from .coupling import (
    EXCLUDED,
    STAYS,
    Branch,
    Contraction,
    Coupling,
    ExpertSet,
    Group,
    Kept,
    Link,
    Node,
    Producer,
    Scale,
    Stay,
    Touch,
    Weight,
)
from .prove import couple
from .slim import slim_module
from .unsupported import unsupported_modules

__all__ = [
    "EXCLUDED",
    "STAYS",
    "Branch",
    "Contraction",
    "Coupling",
    "ExpertSet",
    "Group",
    "Kept",
    "Link",
    "Node",
    "Producer",
    "Scale",
    "Stay",
    "Touch",
    "Weight",
    "couple",
    "slim_module",
    "unsupported_modules",
]
