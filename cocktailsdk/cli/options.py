"""Arguments and options that several commands take, and what shells offer for them; nothing here loads torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import CocktailError

__all__ = [
    "PRESETS",
    "RECIPES",
    "SCORES",
    "AsData",
    "Bundle",
    "Data",
    "Device",
    "Model",
    "TrustBuildRecord",
    "networks",
    "presets",
    "recipes",
    "scores",
]

AsData = Annotated[bool, typer.Option("--json", help="Print the same as data.")]

Bundle = Annotated[
    Path, typer.Argument(metavar="BUNDLE", help="A bundle's folder, or a finished run's.", show_default=False)
]

Model = Annotated[
    str | None,
    typer.Option(
        help="How the model is built: a timm name, hf:TYPE_OR_PATH, torchvision:NAME or package.module:factory.",
        show_default="as the run or the bundle says",
    ),
]

TrustBuildRecord = Annotated[
    bool,
    typer.Option(
        "--trust-build-record",
        help="Without --model, build any class of timm, torchvision and transformers that the bundle names: for "
        "bundles whose maker you trust.",
    ),
]

Data = Annotated[Path | None, typer.Option(help="Folder of the images; the digits need none.", show_default=False)]

Device = Annotated[str | None, typer.Option(help="cpu, cuda, mps …", show_default="cpu")]

PRESETS = ("digits", "cifar10", "fashion-mnist")
"""Names of the presets, as the package of presets has them."""


RECIPES = (
    "cocktail",
    "pretrained",
    "paper",
    "paper-finishing",
    "paper-no-umg",
    "paper-rotation",
    "paper-no-merging",
    "paper-no-rewinding",
    "paper-no-distillation",
    "us-net",
    "mutualnet",
    "refilling",
)
"""Names of the recipes that train the networks of a preset; the others train a net of one pattern or one network."""


SCORES = ("magnitude", "wanda", "sparsegpt", "taylor", "fisher", "activation")
"""Names of the scores, as the package of scores has them."""


def scores(incomplete: str) -> list[str]:
    """Scores that begin so, also after a pattern: ``channel=act``."""
    pattern, equals, name = incomplete.rpartition("=")
    return [f"{pattern}{equals}{score}" for score in SCORES if score.startswith(name)]


def presets(incomplete: str) -> list[str]:
    """Presets that begin so."""
    return [name for name in PRESETS if name.startswith(incomplete)]


def recipes(incomplete: str) -> list[str]:
    """Recipes that begin so."""
    return [name for name in RECIPES if name.startswith(incomplete)]


def networks(ctx: typer.Context, incomplete: str) -> list[str]:
    """Networks of the bundle given before that begin so."""
    from ..bundle.files import listed_subnets, read_meta
    from .bundles import bundle_folder

    bundle = ctx.params.get("bundle")
    if bundle is None:
        return []
    try:
        subnets = listed_subnets(read_meta(bundle_folder(Path(bundle)))[1])
        return [s["name"] for s in subnets if s["name"].startswith(incomplete) and s["name"].isprintable()]
    except (CocktailError, OSError):  # a half-typed path, say: there is nothing to offer
        return []
