"""From a model to its weights, channel units and groups. Knows nothing of sparsity."""

from .coupling import STAYS, Contraction, Coupling, Group, Kept, Producer, Touch, Weight

__all__ = ["STAYS", "Contraction", "Coupling", "Group", "Kept", "Producer", "Touch", "Weight"]
