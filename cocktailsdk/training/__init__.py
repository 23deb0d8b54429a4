"""Training: rounds of pruning, co-training and rewinding, then merging (paper, section 3)."""

from . import events, schedules
from .metrics import accuracy
from .recipes import Recipe
from .trainer import CoTrainer

__all__ = ["CoTrainer", "Recipe", "accuracy", "events", "schedules"]
