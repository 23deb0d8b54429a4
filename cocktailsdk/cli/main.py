"""The command line's entry point. Importing it loads neither torch nor any model library."""

from __future__ import annotations

import gc
import sys
from typing import Annotated

import typer

from ..version import __version__
from .bench import bench_bundle
from .evaluate import evaluate
from .export import export_subnet
from .group import Group
from .inspect import inspect_model
from .report import report_run
from .subnets import list_subnets
from .train import train

__all__ = ["app", "main"]

app = typer.Typer(
    name="cocktail-cli",
    help="One checkpoint, every sparse pattern, every ratio.",
    cls=Group,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"cocktailsdk {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    del version


def _example(*lines: str) -> str:
    return "Example:  " + "   ".join(f"[bold]{line}[/bold]" for line in lines)


app.command("train", epilog=_example("cocktail-cli train --preset digits --out runs/digits"))(train)
app.command("inspect", epilog=_example("cocktail-cli inspect resnet50"))(inspect_model)
app.command("subnets", epilog=_example("cocktail-cli subnets runs/digits"))(list_subnets)
app.command("eval", epilog=_example("cocktail-cli eval runs/digits channel@0.271 2:4"))(evaluate)
app.command("bench", epilog=_example("cocktail-cli bench runs/digits --batch 1 --batch 32"))(bench_bundle)
app.command("export", epilog=_example("cocktail-cli export runs/digits channel@0.271 digits.onnx"))(export_subnet)
app.command("report", epilog=_example("cocktail-cli report runs/digits --html digits.html"))(report_run)


def main() -> None:
    """Run the command line."""
    try:
        app()
    except SystemExit as end:
        if not end.code:
            _leave_processes()
        raise


def _leave_processes() -> None:
    """Close the connections to the run's other processes, if there are any.

    Where Python is left to do it at its end, gloo's threads may let go of a tensor when there is no interpreter
    any more, which aborts a process that has done all its work. After an error nobody waits for the others.
    """
    dist = sys.modules.get("torch.distributed")
    if dist is not None and dist.is_available() and dist.is_initialized():
        gc.collect()  # models wrapped for several processes hold on to the connections
        dist.destroy_process_group()
