"""From a bundle on the command line to a net, and to what its networks measure."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from ..api import CocktailNet, from_pretrained
from ..errors import BundleError, TrainingError
from ..patterns import DENSE
from ..presets import PRESETS, get_preset
from ..report.run import NetworkRow, network_rows
from ..training.metrics import accuracy, mean_score
from ..utils.nested import default_forward
from .bundles import bundle_folder, run_report

__all__ = ["load_net", "measure", "preset_batches", "takes_model"]


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
        from .models import build

        return from_pretrained(folder, build(model, meta=False))
    report = run_report(folder)
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
    report = run_report(bundle_folder(path))
    if report is None or report.preset not in PRESETS:
        if data is not None:
            raise TrainingError(
                f"--data {data} is read by the preset of a run, and {path} is no run of a preset: leave it out, or "
                "calibrate in Python, net.export(name, path, int8=True, calibration=batches)"
            )
        return {}
    loaders = get_preset(report.preset).loaders(data)
    return {"calibration": list(islice(loaders.train, most)), "evaluation": list(loaders.test)}


def takes_model(preset: str) -> bool:
    """Whether a preset has several models to choose from."""
    return preset in PRESETS and "model" in (PRESETS[preset].__kwdefaults__ or {})


def measure(
    bundle: Path, preset: str, names: Sequence[str] | None, *, data: Path | None = None, model: str | None = None
) -> tuple[NetworkRow, ...]:
    """Accuracy of a bundle's networks.

    Args:
        bundle: Its folder.
        preset: Whose model and test data.
        names: Which networks; all if ``None``.
        data: The folder of images.
        model: The preset's model.

    Raises:
        SubnetError: A name that is no network.
        BundleError: The bundle cannot be read, or is not of that model.
        TrainingError: The preset is unknown, or its data are not there.
    """
    chosen = get_preset(preset, model=model)
    net = from_pretrained(bundle, chosen.build_model())
    wanted = [net.subnet(n).name for n in names] if names else [DENSE, *(n for n in net.names if n in net.masks)]
    batches = list(chosen.loaders(data).test)
    test = {}
    for name in wanted:
        with net.using(name):
            test[name] = mean_score(net.model, batches, default_forward, accuracy).number
    return network_rows([s for s in net.subnets() if s.name in test], test, net.metrics)
