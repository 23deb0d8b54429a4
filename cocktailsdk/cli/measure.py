"""Measuring a bundle's networks on a preset's test data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..api import from_pretrained
from ..patterns import DENSE
from ..presets import PRESETS, get_preset
from ..report.run import NetworkRow, network_rows
from ..training.metrics import accuracy, mean_score
from ..utils.nested import default_forward

__all__ = ["measure", "takes_model"]


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
