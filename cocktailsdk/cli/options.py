"""Arguments and options that several commands take, each in one place."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["AsData", "Bundle", "Model", "TrustBuildRecord"]

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
