"""Training: rounds of pruning, co-training and rewinding, then merging (paper, section 3)."""

from . import events, schedules
from .metrics import accuracy
from .trainer import CoTrainer

__all__ = ["CoTrainer", "accuracy", "events", "schedules"]
