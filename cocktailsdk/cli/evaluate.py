"""``cocktail-cli eval``."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from .bundles import bundle_folder, run_report
from .checks import check_preset, check_subnets
from .console import command, log_to, messages, print_json, results
from .options import AsData, Bundle, Data, networks

__all__ = ["evaluate"]


@command
def evaluate(
    bundle: Bundle,
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="NAME…", help="Which networks; all if none.", show_default=False, autocompletion=networks
        ),
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="Whose model and test data to use.", show_default="as the run had it")
    ] = None,
    data: Data = None,
    model: Annotated[str | None, typer.Option(help="The preset's model.", show_default="as the run had it")] = None,
    as_json: AsData = False,
) -> None:
    """Measure networks of a bundle on a preset's test data."""
    log_to(messages())
    folder = bundle_folder(bundle)

    report = run_report(folder)
    if preset is None:
        if report is None:
            raise typer.BadParameter(
                f"there is no report beside {folder} that says it: name the preset", param_hint="--preset"
            )
        preset = report.preset

    check_preset(preset, data=data, model=model)
    check_subnets(folder, names or [])

    from .nets import measure, takes_model

    if model is None and report is not None and report.preset == preset and takes_model(preset):
        model = report.model
    rows = measure(folder, preset, names or None, data=data, model=model)
    if as_json:
        print_json({"bundle": str(folder), "preset": preset, "networks": [asdict(r) for r in rows]})
        return
    from ..report.tables import networks_table

    results().print(networks_table(rows))
