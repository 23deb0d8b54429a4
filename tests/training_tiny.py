"""A network and data so small that whole training runs take seconds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import cocktailsdk as cocktail
from cocktailsdk.presets.datasets import Images, TensorLoader
from cocktailsdk.training.keywords import MOVED
from cocktailsdk.training.schedules import cosine
from cocktailsdk.training.settings import GROUPS


class TinyNet(nn.Module):
    """Convolutions with batch norm, a residual sum, and dropout, which draws random numbers in every step."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(8)
        self.conv3 = nn.Conv2d(8, 16, 3, 2, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(16)
        self.dropout = nn.Dropout(0.1)
        self.fc = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = x + F.relu(self.bn2(self.conv2(x)))
        x = F.relu(self.bn3(self.conv3(x)))
        return self.fc(self.dropout(x.mean((2, 3))))


def tiny_images(n: int = 48, seed: int = 0) -> Images:
    """Four classes that differ in which quarter of the image is bright."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 4
    images = torch.randint(0, 120, (n, 1, 8, 8), generator=generator)
    for i, label in enumerate(labels.tolist()):
        row, column = divmod(label, 2)
        images[i, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] += 60
    return Images(images.to(torch.uint8), labels)


def to_float(images: Tensor) -> Tensor:
    return images.float() / 128 - 0.5


def augment(images: Tensor) -> Tensor:
    return to_float(images) + 0.1 * torch.randn(images.shape)


def tiny_net(seed: int = 0, patterns: Any = None) -> cocktail.CocktailNet:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = TinyNet()
    patterns = patterns or (
        cocktail.Unstructured(sparsities=[0.3, 0.5, 0.7]),
        "1:2",
        cocktail.Channel(sparsities=[0.2, 0.4, 0.5], round_to=1),
    )
    return cocktail.sparsify(model, patterns, example_inputs=(torch.zeros(1, 1, 8, 8),))


def tiny_loaders() -> tuple[TensorLoader, TensorLoader]:
    train = TensorLoader(tiny_images(), 8, augment, shuffle=True)
    held_out = TensorLoader(tiny_images(32, seed=1), 16, to_float)
    return train, held_out


def grouped(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Keywords of the trainer, its settings under the flat names that ``configuration.json`` has for them.

    With flat names a test's options are merged with others by ``{**defaults, **options}``.
    """
    groups: dict[str, dict[str, Any]] = {}
    keywords = {}
    for name, value in flat.items():
        if name in MOVED and not isinstance(value, GROUPS.get(name, ())):
            group, setting = MOVED[name]
            groups.setdefault(group, {})[setting] = value
        else:
            keywords[name] = value
    return {**keywords, **{group: GROUPS[group](**settings) for group, settings in groups.items()}}


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=1e-3)


def tiny_trainer(
    net: cocktail.CocktailNet | None = None, out_dir: Path | None = None, **options: Any
) -> cocktail.CoTrainer:
    """The paper's run of 4 rounds with 2 epochs of 6 steps each, and 3 coefficients to merge with.

    Settings are given by their flat names, see :func:`grouped`.
    """
    train, held_out = tiny_loaders()
    settings: dict[str, Any] = {
        "recipe": "paper",
        "val_loader": held_out,
        "optimizer": sgd,
        "schedule": cosine(),
        "epochs": 2,
        "rewind_epoch": 1,
        "alphas": (1.0, 0.7, 0.4),
        "recalibration_batches": 2,
        "event_seconds": 0,
        "out_dir": out_dir,
    }
    loader = options.pop("train_loader", train)
    loss_fn: Callable[..., Tensor] | None = options.pop("loss_fn", F.cross_entropy)
    return cocktail.CoTrainer(net or tiny_net(), loader, loss_fn, **grouped({**settings, **options}))


def result(trainer: cocktail.CoTrainer) -> dict[str, Any]:
    """All that a run leaves, for comparing bit by bit."""
    net = trainer.net
    history = trainer.history.to_dict()
    del history["seconds"]
    return {
        "weights": {name: tensor.clone() for name, tensor in net.state_dict().items()},
        "masks": {
            name: {**mask.elements, **({} if mask.removed is None else {"removed": mask.removed})}
            for name, mask in net.masks.items()
        },
        "statistics": {name: dict(s) for name, s in net.statistics.items()},
        "private": {name: dict(own) for name, own in net.private.items()},
        "metrics": dict(net.metrics),
        "history": history,
    }


def assert_identical(a: Any, b: Any, where: str = "") -> None:
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert list(a) == list(b), where
        for key in a:
            assert_identical(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), where
    else:
        assert a == b, where
