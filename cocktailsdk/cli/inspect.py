"""``cocktail-cli inspect``."""

from __future__ import annotations

import math
import re
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import CocktailError
from ..io.atomic import write_atomic
from .checks import output_file
from .console import command, log_to, messages, print_json, results
from .options import AsData

if TYPE_CHECKING:
    from torch import nn

    from ..inspection import ChannelGroup, Inspection

__all__ = ["inspect_model"]

MOST_ELEMENTS = 10**8
"""Elements of an example: more are a slip of the finger."""


@command
def inspect_model(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A timm name (resnet50), hf:TYPE_OR_PATH (hf:bert, hf:DIR/config.json), torchvision:NAME or "
            "package.module:factory.",
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
    full: Annotated[
        bool, typer.Option("--full", help="Show every layer and group of large models, repeated blocks too.")
    ] = False,
    groups: Annotated[
        bool, typer.Option("--groups", help="Explain every channel group: what one unit of it removes, and saves.")
    ] = False,
    group: Annotated[
        list[str] | None,
        typer.Option(
            "--group",
            metavar="NAME",
            help="Explain the groups of this name, or that NAME with * fits ('layer2*'); may be repeated.",
            show_default=False,
        ),
    ] = None,
    why: Annotated[
        list[str] | None,
        typer.Option(
            "--why",
            metavar="MODULE",
            help="Say with which group a module's or parameter's channels go, or why it is kept; may be repeated.",
            show_default=False,
        ),
    ] = None,
    svg: Annotated[
        Path | None, typer.Option("--svg", metavar="FILE", help="Draw the coupling graph.", show_default=False)
    ] = None,
    meta: Annotated[
        bool | None,
        typer.Option(
            "--meta/--no-meta",
            help="Build the model without values: any size in little memory, but what can be slimmed is then not "
            "proven. By default for models of more than 1 G parameters.",
            show_default=False,
        ),
    ] = None,
    as_json: AsData = False,
) -> None:
    """Show what of a model is prunable, what is coupled, and what is kept whole and why."""
    log_to(messages())
    sizes = [_size(text) for text in input_size or []]
    _check_views(full=full, groups=groups, group=bool(group), why=bool(why), svg=svg is not None, as_json=as_json)
    output_file(svg, "--svg")
    if svg is not None and svg.suffix.lower() != ".svg":
        raise CocktailError(f"--svg {svg} would hold an SVG drawing; write it to {svg.with_suffix('.svg')}")

    from ..inspection import inspect
    from .models import build, inputs_for

    built: nn.Module = build(model, meta)
    args, kwargs = inputs_for(built, sizes)
    found = inspect(built, args, kwargs)
    answers = [found.why(name) for name in why or []]
    chosen = _chosen(found, group or [])
    if svg is not None:
        svg.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(svg, found.to_svg(model))
        messages().print(f"the coupling graph is drawn in {svg}", soft_wrap=True)
    if as_json:
        data: dict[str, Any] = {"reference": model, **found.to_dict()}
        if group:
            data["groups"] = [g for g in data["groups"] if g["name"] in {c.name for c in chosen}]
        if answers:
            data["why"] = [a.to_dict() for a in answers]
        print_json(data)
        return
    from ..report.groups import groups_view, why_view
    from ..report.inspection import inspection_view

    if groups or group:
        results().print(groups_view(found, chosen, model))
    if answers:
        results().print(why_view(answers))
    if not (groups or group or answers or svg is not None):
        results().print(inspection_view(found, model, full=full))


def _chosen(found: Inspection, names: list[str]) -> list[ChannelGroup]:
    """Groups by their names, or by what a name with ``*`` fits; all where none is named."""
    from ..utils.layer_names import nearest

    if not names:
        return list(found.groups)
    for name in names:
        if not any(fnmatchcase(g.name, name) for g in found.groups):
            hint = nearest(name, [g.name for g in found.groups]) or "; without --group, --groups lists all"
            raise CocktailError(f"{found.model} has no channel group {name!r}{hint}")
    return [g for g in found.groups if any(fnmatchcase(g.name, name) for name in names)]


def _check_views(*, full: bool, groups: bool, group: bool, why: bool, svg: bool, as_json: bool) -> None:
    """See that options say what is shown, and that each has an effect.

    Raises:
        CocktailError: One has none.
    """
    if as_json and (groups or full):
        option = "--groups" if groups else "--full"
        raise CocktailError(f"{option} is for the tables, and --json prints all: leave one of them out")
    if groups and group:
        raise CocktailError("--groups explains every group, and --group some: give one of them")
    if full and (groups or group or why or svg):
        raise CocktailError("--full does not go with --groups, --group, --why and --svg: leave it out")


def _size(text: str) -> tuple[int, ...]:
    parts = re.split(r"\s*[,x]\s*|\s+", text.strip())
    if not all(p.isdecimal() and int(p) > 0 for p in parts):
        raise typer.BadParameter(f"{text!r} is no shape; write it like 3,224,224", param_hint="--input-size")
    size = tuple(int(p) for p in parts)
    if math.prod(size) > MOST_ELEMENTS:
        raise typer.BadParameter(
            f"{text!r} has {math.prod(size):.0e} elements; at most {MOST_ELEMENTS:.0e} are tried",
            param_hint="--input-size",
        )
    return size
