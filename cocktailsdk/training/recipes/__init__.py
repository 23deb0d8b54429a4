"""What a run does, by name: step schedules, mask rules and options, put together as recipes (see docs/recipes.md)."""

from ...moved import moved_names
from .allocation import PassAllocation
from .masks import MASK_RULES, MaskRule, Pruning
from .named import default_recipe, recipe_named, recipes
from .recipe import Recipe
from .steps import SCHEDULES, ScheduleContext, Step, StepSchedule, SubnetPass

__all__ = [
    "MASK_RULES",
    "SCHEDULES",
    "MaskRule",
    "PassAllocation",
    "Pruning",
    "Recipe",
    "ScheduleContext",
    "Step",
    "StepSchedule",
    "SubnetPass",
    "default_recipe",
    "recipe_named",
    "recipes",
]

__getattr__ = moved_names(__name__, {"Moment": f"{__name__}.ScheduleContext", "Turn": f"{__name__}.SubnetPass"})
