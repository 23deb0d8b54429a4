"""From a preset to a finished run's folder."""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ..bundle import bundle_bytes
from ..io.atomic import remove_stale
from ..presets import Prepared, Preset, get_preset
from ..report.figure import write_figure
from ..report.live import RunView, run_view_for
from ..report.recorded import recorded
from ..report.run import RunReport, dense_bytes, network_rows, read_report, versions
from ..training.events import Callback, Event
from ..utils.optional import installed, missing
from ..utils.undo import computing_threads

__all__ = ["BUNDLE", "PICTURE", "train_preset"]

BUNDLE = "bundle"
PICTURE = "networks.png"


def train_preset(
    name: str,
    folder: Path,
    console: Console,
    *,
    data: Path | None = None,
    seed: int | None = None,
    device: str | None = None,
    weights: Path | None = None,
    score: str | Mapping[str, str] | None = None,
    settings: Mapping[str, Any] | None = None,
    callbacks: Sequence[Callback] = (),
) -> RunReport | None:
    """Train a preset in a folder, or go on there; a run that is finished is only read.

    Of several processes (``torchrun``) all call this; the main one alone writes, and has the report.

    Args:
        name: The preset.
        folder: Holds ``state/``, and at the end ``bundle/``, ``report.json`` and, with matplotlib, a picture.
        console: For progress.
        data: The folder of images.
        seed: By default the preset's.
        device: Where to train.
        weights: File of trained weights to start from.
        score: By what masks are ranked; ``None`` for magnitude.
        settings: Further settings of the preset; ``None`` stands for its default.
        callbacks: What watches the run besides the view.

    Raises:
        TrainingError: The preset or a setting is unknown, data or weights are missing, or the folder holds a run of
            another configuration.
        KeyboardInterrupt: The run was interrupted, its state saved.
    """
    preset = get_preset(name, **(settings or {}), weights=weights)
    views: list[RunView] = []  # the view needs the networks' names, and they need the trainer's arguments

    def watch(event: Event) -> None:
        for view in views:
            view(event)

    options: dict[str, Any] = {} if score is None else {"score": score}
    prepared = preset.prepare(data, seed=seed, out_dir=folder, callbacks=(watch, *callbacks), device=device, **options)
    ranks = prepared.trainer.ranks

    def finished() -> RunReport | None:
        report = read_report(folder)
        mine = report is not None and report.fingerprint == prepared.trainer.fingerprint
        return report if mine and (folder / BUNDLE).is_dir() else None

    done = finished() if ranks.is_main else None
    if ranks.from_main(lambda: done is not None):
        console.print(f"the run in {folder} is finished", soft_wrap=True)
        return done
    if message := missing("matplotlib", purpose="drawing the picture"):
        console.print(f"{PICTURE} is left out: {message}", soft_wrap=True)
    subnets = [prepared.net.subnet(n) for n in prepared.net.names]
    title = f"{preset.name} · {preset.model} · {len(subnets)} networks · {folder}"
    with _threads(preset.threads), run_view_for(console, title, subnets) as view:
        views.append(view)
        _tidy(folder)
        prepared.trainer.fit()
        view.note("measuring every network on the test data")
        test = prepared.trainer.evaluate(prepared.loaders.test)
        if not ranks.is_main:
            return None
        file = None if weights is None else weights.name
        command = _command(name, score, **(settings or {}), weights=file, seed=seed)
        report = _report(prepared, test, preset, folder, seed, command)
    report.write(folder)
    return report


def _tidy(folder: Path) -> None:
    """Remove what an earlier process that was killed left half-written beside the bundle and the report."""
    remove_stale(folder)
    for stale in folder.glob(f".{BUNDLE}.new-*"):
        shutil.rmtree(stale, ignore_errors=True)


def _threads(most: int | None) -> AbstractContextManager[None]:
    """At most so many threads for a while, unless the user has said how many."""
    fewer = most is not None and most < torch.get_num_threads() and "OMP_NUM_THREADS" not in os.environ
    return computing_threads(most if fewer else None)


def _command(name: str, score: str | Mapping[str, str] | None, **options: Any) -> str:
    """The command line that trains the same, without the paths of this machine."""
    pairs = [(f"--{key.replace('_', '-')}", str(value)) for key, value in options.items() if value is not None]
    by_pattern = {"*": score} if isinstance(score, str) else score or {}
    pairs += [("--score", of if pattern == "*" else f"{pattern}={of}") for pattern, of in by_pattern.items()]
    return shlex.join(["cocktail-cli", "train", "--preset", name, *(part for pair in pairs for part in pair)])


def _report(
    prepared: Prepared, test: Mapping[str, float], preset: Preset, folder: Path, seed: int | None, command: str
) -> RunReport:
    """Write all but the report itself."""
    net, trainer, _ = prepared
    net.provenance |= {"command": command, "data": preset.name}
    net.save_pretrained(folder / BUNDLE)
    report = RunReport(
        networks=network_rows(net.subnets(), test, net.metrics),
        bundle_bytes=bundle_bytes(folder / BUNDLE),
        dense_bytes=dense_bytes(net.model),
        seconds=trainer.history.seconds,
        preset=preset.name,
        model=preset.model,
        seed=preset.seed if seed is None else seed,
        alphas=tuple(trainer.history.alphas),
        fingerprint=trainer.fingerprint,
        environment={**versions(), "command": command},
        **recorded(net, trainer),
    )
    if installed("matplotlib"):
        write_figure(report, folder / PICTURE)
    return report
