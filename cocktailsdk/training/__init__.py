"""Training: rounds of pruning, co-training and rewinding, then merging (paper, section 3)."""

from . import events, schedules
from .finetuning import finetune
from .loop import CoLoop
from .loop_step import LoopStep
from .metrics import accuracy
from .range_test import LearningRateSuggestion
from .recipes import Recipe, ScheduleContext, Step, SubnetPass
from .settings import (
    BatchSettings,
    DistillationSettings,
    EvaluationSettings,
    ExecutionSettings,
    OutputSettings,
    RoundSettings,
)
from .step.hooks import StepContext, StepHook
from .trainer import CoTrainer

__all__ = [
    "BatchSettings",
    "CoLoop",
    "CoTrainer",
    "DistillationSettings",
    "EvaluationSettings",
    "ExecutionSettings",
    "LearningRateSuggestion",
    "LoopStep",
    "OutputSettings",
    "Recipe",
    "RoundSettings",
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
