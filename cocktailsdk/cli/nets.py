"""From a bundle on the command line to a net."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

from ..api import CocktailNet, from_pretrained
from ..errors import BundleError, TrainingError
from ..presets import PRESETS, get_preset
from ..report.run import read_report
from .bundles import bundle_folder, run_folder
from .measure import takes_model

__all__ = ["load_net", "preset_batches"]


def load_net(path: Path, model: str | None, trust_build_record: bool = False) -> CocktailNet:
    """The net of a bundle.

    Args:
        path: The bundle's folder, or a finished run's.
        model: How its model is built; if ``None``, as the run's report or the bundle says.
        trust_build_record: Whether the bundle may say classes that are not listed.

    Raises:
        BundleError: There is no bundle, it cannot be read or is of another model, or nobody says how to build that.
        AdapterError: The model cannot be built.
    """
    folder = bundle_folder(path)
    if model is not None:
        from .sizes import build

        return from_pretrained(folder, build(model, meta=False))
    report = read_report(run_folder(folder))
    if report is None or report.preset not in PRESETS:
        try:
            return from_pretrained(folder, trust_build_record=trust_build_record)
        except BundleError as error:
            raise BundleError(
                f"{error}; on the command line name it with --model (a timm name, hf:TYPE_OR_PATH, torchvision:NAME or "
                "package.module:factory)"
            ) from error
    chosen = get_preset(report.preset, model=report.model if takes_model(report.preset) else None)
    return from_pretrained(folder, chosen.build_model())


def preset_batches(path: Path, data: Path | None, most: int = 8) -> dict[str, Any]:
    """Batches to calibrate int8 on and to measure it by, from the preset of a run; nothing where there is none.

    Args:
        path: The bundle's folder, or a finished run's.
        data: The folder of images.
        most: Training batches to calibrate on.

    Raises:
        TrainingError: The data are not there, or there is no preset that reads them.
    """
    report = read_report(run_folder(bundle_folder(path)))
    if report is None or report.preset not in PRESETS:
        if data is not None:
            raise TrainingError(
                f"--data {data} is read by the preset of a run, and {path} is no run of a preset: leave it out, or "
                "calibrate in Python, net.export(name, path, int8=True, calibration=batches)"
            )
        return {}
    loaders = get_preset(report.preset).loaders(data)
    return {"calibration": list(islice(loaders.train, most)), "evaluation": list(loaders.test)}
