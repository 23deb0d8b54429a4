"""``cocktail-cli report``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import TrainingError
from ..utils.optional import check_installed
from .checks import input_file, input_folder, output_file, output_folder
from .console import command, log_to, messages, print_json, results

if TYPE_CHECKING:
    from ..report.page import ReportedRun

__all__ = ["report_run"]


@command
def report_run(
    run: Annotated[
        Path | None, typer.Argument(metavar="RUN", help="The folder of a finished run.", show_default=False)
    ] = None,
    compare: Annotated[
        tuple[Path, Path] | None,
        typer.Option(metavar="RUN RUN", help="Lay two runs side by side, instead of RUN.", show_default=False),
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Where the page goes.", show_default="report.html in the run's folder"),
    ] = None,
    figures: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Write every figure there as PNG and SVG, for papers.", show_default=False),
    ] = None,
    profile: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="A device profile that cocktail-cli bench wrote; may be repeated.",
            show_default="those in the run's folder",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was written, and the reports, as data.")] = False,
) -> None:
    """Show a finished run, or two side by side, as one page that needs no network.

    Without --html and --figures the page is report.html in the (first) run's folder.
    """
    log_to(messages())
    if (run is None) == (compare is None):
        raise typer.BadParameter("give one RUN, or --compare RUN RUN", param_hint="RUN")
    folders = compare if compare is not None else (run,)
    if compare is not None and profile:
        raise typer.BadParameter(
            "profiles are found in each run's folder where two are compared", param_hint="--profile"
        )
    for file in profile or []:
        input_file(file, "--profile")
    for folder in filter(None, folders):
        _home(Path(folder))
    output_file(html, "--html")
    output_folder(figures, "--figures")
    check_installed("matplotlib", purpose="drawing the charts of a report")

    from ..io.atomic import write_atomic
    from ..report.page import report_page

    runs = [_read(Path(folder), profile) for folder in folders if folder is not None]
    written: dict[str, Any] = {}
    if html is not None or figures is None:
        target = html if html is not None else runs[0].folder / "report.html"
        target.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(target, report_page(runs))
        written["html"] = str(target)
    if figures is not None:
        from ..report.figures import write_figures

        within = [figures] if len(runs) == 1 else [figures / letter for letter in "ab"]
        made = [write_figures(r.report, r.folder, to, r.profiles) for r, to in zip(runs, within, strict=True)]
        written["figures"] = [str(path) for paths in made for path in paths]
    if as_json:
        values = [{"folder": str(r.folder), "profiles": len(r.profiles), "report": r.report.to_dict()} for r in runs]
        print_json({**written, "runs": values})
        return
    screen = results()
    if "html" in written:
        screen.print(f"page: {written['html']}", soft_wrap=True)
    if figures is not None:
        screen.print(f"figures: {len(written['figures'])} files in {figures}", soft_wrap=True)


def _home(folder: Path) -> None:
    """See that a run's folder is there and can be read."""
    if not folder.exists():
        raise TrainingError(f"{folder} does not exist; give the folder of a finished run")
    if folder.is_dir():
        input_folder(folder, "RUN")
    else:
        input_file(folder, "RUN")


def _read(folder: Path, profiles: list[Path] | None) -> ReportedRun:
    """A run, its report read, with the device profiles given, or else those that lie in its folder."""
    from ..report.page import ReportedRun
    from ..report.run import read_report

    report = read_report(folder)
    if report is None:
        raise TrainingError(
            f"{folder} holds no report.json: give a finished run's; cocktail-cli train --out {folder} makes one"
        )
    if not report.networks:
        raise TrainingError(f"the report in {folder} has no networks; train again")
    home = folder if folder.is_dir() else folder.parent
    found = profiles if profiles is not None else sorted(home.glob("*.profile.json"))
    if not found:
        return ReportedRun(report, home)
    from ..choosing.profile import read_profile  # late: it loads torch

    return ReportedRun(report, home, tuple(map(read_profile, found)))
