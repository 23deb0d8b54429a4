"""A bundle to try the service with: a wide ResNet-8 on scikit-learn's digits, at six widths."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn
from torch.nn.functional import cross_entropy

import cocktailsdk as cocktail
from cocktailsdk.presets import get_preset
from cocktailsdk.presets.models import DigitsNet
from cocktailsdk.report.run import versions

__all__ = ["MODEL", "model", "train"]

MODEL = "cocktail_serving.digits:model"
WIDTHS = (64, 128, 256)
"""Four times the preset's: the preset's own network takes less time than the web server."""


def model() -> nn.Module:
    """The network, with random weights."""
    return DigitsNet(WIDTHS)


def train(folder: Path, *, epochs: int = 2, seed: int = 0, **options: Any) -> Path:
    """Train the bundle, or go on where a run in the folder stopped; all done, do nothing.

    Args:
        folder: For the run's state and the bundle.
        epochs: Of every round.
        seed: Of weights and training.
        **options: Of :class:`cocktailsdk.CoTrainer`.

    Returns:
        The bundle's folder.
    """
    import torch

    bundle = folder / "bundle"
    if bundle.is_dir():
        return bundle
    train_loader, merge, test = get_preset("digits").loaders()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        dense = model()
    channel = cocktail.Channel(rounds=5, rate=0.2, round_to=8)
    net = cocktail.sparsify(dense, [channel], example_inputs=(torch.zeros(1, 1, 8, 8),))
    trainer = cocktail.CoTrainer(
        net, train_loader, cross_entropy, val_loader=merge, epochs=epochs, seed=seed, out_dir=folder, **options
    )
    trainer.fit()
    net.metrics.update(trainer.evaluate(test))
    net.provenance.update(data="scikit-learn's digits", metric="accuracy on the test images", versions=versions())
    net.save_pretrained(bundle)
    return bundle
