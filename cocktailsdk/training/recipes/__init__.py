"""What a run does, by name: step schedules, mask rules and options, put together as recipes (see docs/recipes.md)."""

from .masks import MASK_RULES, MaskRule, Pruning
from .named import recipe_named, recipes
from .recipe import Recipe
from .steps import SCHEDULES, Moment, Step, StepSchedule, Turn

__all__ = [
    "MASK_RULES",
    "SCHEDULES",
    "MaskRule",
    "Moment",
    "Pruning",
    "Recipe",
    "Step",
    "StepSchedule",
    "Turn",
    "recipe_named",
    "recipes",
]
