"""``cocktail-cli inspect``."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .console import command, log_to, messages, print_json, results

if TYPE_CHECKING:
    from torch import nn

__all__ = ["inspect_model"]


@command
def inspect_model(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A timm name (resnet50), hf:TYPE_OR_PATH (hf:bert), torchvision:NAME or package.module:factory.",
            show_default=False,
        ),
    ],
    input_size: Annotated[
        list[str] | None,
        typer.Option(
            "--input-size",
            metavar="SIZE",
            help="Shape of one example without the batch, like 3,224,224; once for each input.",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the same as data.")] = False,
) -> None:
    """Show what of a model is prunable, what is coupled, and what is kept whole and why."""
    log_to(messages())
    sizes = [_size(text) for text in input_size or []]

    from ..adapters import build_model
    from ..inspection import inspect
    from .inputs import inputs_for

    built: nn.Module = build_model(model)
    args, kwargs = inputs_for(built, sizes)
    found = inspect(built, args, kwargs)
    if as_json:
        data: dict[str, Any] = {"reference": model, **found.to_dict()}
        print_json(data)
        return
    from ..report.inspection import inspection_view

    results().print(inspection_view(found, model))


def _size(text: str) -> tuple[int, ...]:
    parts = [p for p in re.split(r"[,x\s]+", text.strip()) if p]
    if not parts or not all(p.isdecimal() and int(p) > 0 for p in parts):
        raise typer.BadParameter(f"{text!r} is no shape; write it like 3,224,224", param_hint="--input-size")
    return tuple(int(p) for p in parts)
