"""The recipes that have a name: ours, the paper's, its ablations and its rivals."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

from ...errors import TrainingError
from ..rivals.alternating import Alternating
from ..rivals.phases import Phases
from .allocation import PassAllocation
from .recipe import Recipe
from .steps import Sandwich, Single

__all__ = ["default_recipe", "recipe_named", "recipes"]

PAPER = Recipe(name="paper")
COCKTAIL = replace(PAPER, name="cocktail", rewind=False, merging="none", finishing=0.5)
PRETRAINED = Recipe(
    name="pretrained",
    schedule="need",
    masks="levels",
    rounds="one",
    teacher="frozen",
    temperature=None,
    decay="cosine",
    optimizer_defaults="by model",
    allocation=PassAllocation(),
    refit_head="auto",
    merging="none",
    clip=0.6,
)
ONE_ROUND = Recipe(name="one round", masks="own", rounds="one", distill=False, merging="none")
US_NET = replace(ONE_ROUND, name="us-net", schedule=Sandwich(), distill=1.0)

_ALL = (
    COCKTAIL,
    PRETRAINED,
    PAPER,
    replace(PAPER, name="paper-finishing", finishing=0.25, same_batch=True),
    # the paper's ablations
    replace(PAPER, name="paper-no-umg", masks="own"),
    replace(PAPER, name="paper-rotation", schedule="rotation"),
    replace(PAPER, name="paper-no-merging", merging="none"),
    replace(PAPER, name="paper-no-rewinding", rewind=False),
    replace(PAPER, name="paper-no-distillation", distill=False),
    # its rivals
    replace(ONE_ROUND, name="ac/dc", schedule=Phases(), update="active", weights="own", takes="subnet"),
    replace(
        ONE_ROUND,
        name="ast",
        schedule=Alternating(),
        masks="layerwise",
        statistics="separate",
        takes="pattern",
        only=("unstructured", "n:m"),
    ),
    US_NET,
    replace(US_NET, name="mutualnet", schedule=Sandwich(resolutions=(1.0, 0.875, 0.75, 0.571))),
    Recipe(
        name="refilling", schedule=Single("unstructured"), masks="refilling", distill=False, needs=("unstructured",)
    ),
    Recipe(
        name="imp", schedule="single", masks="tickets", distill=False, merging="none", weights="own", takes="pattern"
    ),
)
_RECIPES: Mapping[str, Recipe] = MappingProxyType({recipe.name: recipe for recipe in _ALL})


def recipes() -> Mapping[str, Recipe]:
    """All recipes that have a name, by it."""
    return _RECIPES


def default_recipe(start: str) -> Recipe:
    """The recipe of a run that names none: ``"pretrained"`` from trained weights, otherwise ``"cocktail"``."""
    return PRETRAINED if start == "pretrained" else COCKTAIL


def recipe_named(name: str) -> Recipe:
    """The recipe of a name.

    Raises:
        TrainingError: There is none; says which there are.
    """
    if name not in _RECIPES:
        near = difflib.get_close_matches(str(name), _RECIPES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise TrainingError(f"no recipe {name!r}; there are {', '.join(map(repr, _RECIPES))}{hint}")
    return _RECIPES[name]
