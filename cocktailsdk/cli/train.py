"""``cocktail-cli train``."""

from __future__ import annotations

from contextlib import ExitStack
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ..errors import TrainingError
from ..utils.optional import check_installed
from .checks import check_device, check_preset, check_score, output_folder
from .console import INTERRUPTED, TERMINATED, command, log_to, messages, print_json, results
from .options import Data, Device, presets, recipes, scores

__all__ = ["train"]


class Start(StrEnum):
    """Where a run's weights come from."""

    SCRATCH = "scratch"
    PRETRAINED = "pretrained"


@command
def train(
    preset: Annotated[
        str, typer.Option(help="digits, cifar10 or fashion-mnist.", show_default=False, autocompletion=presets)
    ],
    out: Annotated[
        Path | None, typer.Option(help="The run's folder; the same command resumes it.", show_default="runs/PRESET")
    ] = None,
    data: Data = None,
    model: Annotated[
        str | None, typer.Option(help="resnet20 or resnet18, for the image sets.", show_default=False)
    ] = None,
    epochs_scale: Annotated[
        float | None,
        typer.Option(
            help="Multiplies the epochs of the image sets: 150 in each of 11 rounds, or 5 in all with --weights. 0.02 "
            "of 150 is 3.",
            show_default=False,
        ),
    ] = None,
    weights: Annotated[
        Path | None,
        typer.Option(
            help="Trained weights to start from: a .safetensors file, or a .pth or .pt file with a state dict.",
            show_default=False,
        ),
    ] = None,
    start: Annotated[
        Start | None,
        typer.Option(help="pretrained or scratch; pretrained is the default with --weights.", show_default=False),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            help="What the run does: cocktail, pretrained, paper …",
            show_default="pretrained with --weights, otherwise paper",
            autocompletion=recipes,
        ),
    ] = None,
    score: Annotated[
        list[str] | None,
        typer.Option(
            help="By what masks are ranked: magnitude, or judged from the first training batches, wanda, sparsegpt, "
            "taylor or fisher. Of one pattern: channel=activation; repeat the option for several.",
            show_default="magnitude",
            autocompletion=scores,
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, max=2**63 - 1, help="Of all randomness.", show_default="the preset's")
    ] = None,
    device: Device = None,
    tensorboard: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Write TensorBoard scalars there, as the run goes.", show_default=False),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print report.json instead of the table.")] = False,
) -> None:
    """Train one bundle of sparse networks, and measure every one of them.

    With --weights, the run starts from a trained model, which also teaches all networks.

    The folder then holds the bundle, report.json and, with matplotlib, a picture. Ctrl-C and SIGTERM save (exit codes
    130 and 143); the same command resumes the run.
    """
    console = messages(main_process_only=True)
    log_to(console)
    if start is Start.PRETRAINED and weights is None:
        raise typer.BadParameter("'pretrained' needs the trained weights: give --weights FILE", param_hint="--start")
    folder = out if out is not None else Path("runs") / preset
    begin = None if start is None else start.value
    check_preset(preset, data=data, model=model, epochs_scale=epochs_scale, weights=weights, start=begin, recipe=recipe)
    ranking = check_score(score or ())
    output_folder(folder, "--out")
    output_folder(tensorboard, "--tensorboard")
    if tensorboard is not None:
        check_installed("tensorboard", purpose="--tensorboard", error=TrainingError)
    check_device(device)

    from .runs import PICTURE, train_preset

    try:
        with ExitStack() as stack:
            boards = []
            if tensorboard is not None:
                from ..report.tensorboard import TensorBoard

                boards.append(stack.enter_context(TensorBoard(tensorboard)))
            report = train_preset(
                preset,
                folder,
                console,
                data=data,
                seed=seed,
                device=device,
                weights=weights,
                score=ranking,
                settings={"model": model, "epochs_scale": epochs_scale, "start": begin, "recipe": recipe},
                callbacks=boards,
            )
    except (KeyboardInterrupt, SystemExit) as stop:
        code = INTERRUPTED if isinstance(stop, KeyboardInterrupt) else stop.code
        if code not in (INTERRUPTED, TERMINATED):
            raise
        console.print(f"stopped; the same command resumes from the state in {folder / 'state'}", soft_wrap=True)
        raise typer.Exit(code) from None
    if report is None:  # another process has it
        return
    if as_json:
        print_json(report.to_dict())
        return
    from ..report.tables import run_view

    screen = results()
    screen.print(run_view(report))
    picture = f", {PICTURE}" if (folder / PICTURE).is_file() else ""
    screen.print(f"in {folder}: bundle/, report.json{picture}", soft_wrap=True)
