"""What shells offer when words are completed; nothing here loads torch."""

from __future__ import annotations

from pathlib import Path

import typer

from ..errors import CocktailError

__all__ = ["PRESETS", "networks", "presets"]

PRESETS = ("digits", "cifar10", "fashion-mnist")
"""Names of the presets, as the package of presets has them."""


def presets(incomplete: str) -> list[str]:
    """Presets that begin so."""
    return [name for name in PRESETS if name.startswith(incomplete)]


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
