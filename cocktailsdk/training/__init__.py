"""Training: rounds of pruning, co-training and rewinding, then merging (paper, section 3)."""

from . import events, schedules
from .finetuning import finetune
from .loop import CoLoop
from .loop_step import LoopStep
from .metrics import accuracy
from .recipes import Recipe, ScheduleContext, Step, SubnetPass
from .step.hooks import StepContext, StepHook
from .trainer import CoTrainer

__all__ = [
    "CoLoop",
    "CoTrainer",
    "LoopStep",
    "Recipe",
    "ScheduleContext",
    "Step",
    "StepContext",
    "StepHook",
    "SubnetPass",
    "accuracy",
    "events",
    "finetune",
    "schedules",
]
