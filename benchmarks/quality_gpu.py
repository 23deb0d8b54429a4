"""ResNet-18 on CIFAR-10, the paper's main experiment, on a GPU in pieces of minutes.

    python benchmarks/quality_gpu.py --data DATA --epochs-scale 0.1 --minutes 9
    python benchmarks/quality_gpu.py --data DATA --epochs-scale 0.1 --minutes 9 --recipe paper
    python benchmarks/quality_gpu.py --try        a few steps on random images, on whatever device there is

Repeat the command until it says that it is done (exit status 0; 3 where there is more to do). bfloat16 autocast,
channels_last, ``torch.compile``, images on the device. Rows are in ``benchmarks/results/quality_gpu.json``; the
table shows them beside the paper's Table 2 and the drop from dense to the mean of each pattern (paper, Table 1). With
the JPEG version of the images absolute accuracies are lower than the paper's, and drops are what can be compared.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import sys
from collections.abc import Iterable
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from quality_rows import read, write
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F
from torch.optim import SGD, Optimizer

import cocktailsdk as cocktail
from cocktailsdk import CocktailError
from cocktailsdk.presets.datasets import Images, TensorLoader, cifar10
from cocktailsdk.presets.models import ResNet18
from cocktailsdk.utils.devices import available_device

RESULTS = Path(__file__).resolve().parent / "results" / "quality_gpu.json"
EPOCHS, REWIND, BATCH, HELD_OUT = 150, 7, 128, 2_500
"""The paper's (section 4.1)."""

PAPER = {
    "dense": 92.48,
    "unstructured@0.2": 92.45,
    "unstructured@0.488": 92.44,
    "unstructured@0.738": 92.03,
    "unstructured@0.866": 91.67,
    "channel@0.1": 92.34,
    "channel@0.271": 91.89,
    "channel@0.469": 90.40,
    "channel@0.613": 87.31,
    "1:2": 92.03,
    "2:4": 91.93,
    "4:8": 91.45,
}
"""Accuracies of the paper's Tables 1 (dense) and 2, in %."""

DROPS = {"unstructured": 0.39, "channel": 2.46, "n:m": 0.65}
"""Points from dense to the mean of each pattern's networks (paper, Table 1)."""


class OnDevice(TensorLoader):
    """Batches of images that are on the device from the start, padded, cropped and mirrored there."""

    def __init__(self, data: Images, device: torch.device, batch: int, *, train: bool) -> None:
        there = Images(data.images.to(device), data.labels.to(device))
        super().__init__(there, batch, self._augmented if train else self._plain, shuffle=train, drop_last=train)
        channels = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]], device=device)
        self._mean, self._std = 255 * channels[:, :, None, None]

    def _plain(self, images: Tensor) -> Tensor:
        return ((images.float() - self._mean) / self._std).contiguous(memory_format=torch.channels_last)

    def _augmented(self, images: Tensor) -> Tensor:
        n, _, h, w = images.shape
        padded = F.pad(images, (4,) * 4)
        down, right = torch.randint(0, 9, (2, n, 1)).to(images.device)  # drawn where resuming restores the generator
        mirrored = (torch.rand(n, 1) < 0.5).to(images.device)
        columns = torch.arange(w, device=images.device).expand(n, w)
        columns = right + torch.where(mirrored, columns.flip(1), columns)
        rows = down + torch.arange(h, device=images.device)
        which = torch.arange(n, device=images.device)[:, None, None]
        cropped = padded.permute(0, 2, 3, 1)[which, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
        return self._plain(cropped)


def forward(model: Any, batch: Any) -> tuple[Tensor, Tensor]:
    """In bfloat16 where that is fast; the loss is of float32."""
    images, labels = batch
    with torch.autocast(images.device.type, torch.bfloat16, enabled=images.device.type == "cuda"):
        output = model(images)
    return output.float(), labels


def sgd(parameters: Iterable[Any]) -> Optimizer:
    """The paper's."""
    return SGD(parameters, lr=0.1, momentum=0.9, weight_decay=1e-4)


def trainer_of(asked: argparse.Namespace) -> tuple[cocktail.CoTrainer, TensorLoader]:
    """The run and its test batches."""
    device, batch = torch.device(asked.device), 8 if asked.trying else BATCH
    if asked.trying:
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(0, 256, (48, 3, 32, 32), generator=generator, dtype=torch.uint8)
        train = test = Images(images, torch.arange(48) % 10)
        held_out = 16
    else:
        (train, test), held_out = cifar10(asked.data), HELD_OUT
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(asked.seed)
        model = ResNet18(width=8 if asked.trying else 64).to(memory_format=torch.channels_last)
    patterns = ["unstructured", "n:m", cocktail.Channel(round_to=1)]
    net = cocktail.sparsify(model, patterns, example_inputs=(torch.zeros(2, 3, 32, 32),))
    if device.type == "cuda" and not asked.no_compile:
        net.model.compile()
    epochs = max(1, round(EPOCHS * asked.epochs_scale))
    trainer = cocktail.CoTrainer(
        net,
        OnDevice(train[: len(train) - held_out], device, batch, train=True),
        F.cross_entropy,
        val_loader=OnDevice(train[len(train) - held_out :], device, 500, train=False),
        batches=cocktail.BatchSettings(forward_fn=forward),
        recipe=asked.recipe,
        optimizer=sgd,
        epochs=epochs,
        rounds=cocktail.RoundSettings(
            rewind_epoch=min(max(1, round(REWIND * asked.epochs_scale)), epochs), count=2 if asked.trying else None
        ),
        device=device,
        seed=asked.seed,
        out_dir=asked.out / f"{asked.recipe}-{asked.epochs_scale:g}-{asked.seed}".replace("/", ""),
        output=cocktail.OutputSettings(config={"benchmark": "quality_gpu", "trying": asked.trying}),
    )
    return trainer, OnDevice(test, device, 1000, train=False)


def table(rows: list[dict[str, Any]]) -> Table:
    """Each run beside the paper, in % and in points below the dense network."""
    made = Table("network", "paper", *(f"{r['method']} x{r['epochs_scale']:g}, seed {r['seed']}" for r in rows))
    for name, published in PAPER.items():
        made.add_row(name, f"{published:.2f}", *(f"{100 * r['networks'].get(name, 0):.2f}" for r in rows))
    for pattern, drop in DROPS.items():
        cells = []
        for r in rows:
            mine = [v for n, v in r["networks"].items() if pattern == ("n:m" if ":" in n else n.partition("@")[0])]
            cells.append(f"{100 * (r['networks']['dense'] - mean(mine)):.2f}" if mine else "")
        made.add_row(f"drop to {pattern}", f"{drop:.2f}, wanted below {drop / 2:.2f}", *cells)
    return made


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of CIFAR-10; by default $COCKTAIL_DATA/cifar10")
    parser.add_argument("--recipe", default="cocktail")
    parser.add_argument("--epochs-scale", type=float, default=0.1, help="1 for the paper's 150 epochs a round")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, help="save and stop after so long")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--try", dest="trying", action="store_true", help="random images, a narrow model, two rounds")
    parser.add_argument("--out", type=Path, default=Path("runs/quality_gpu"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="run nothing")
    asked = parser.parse_args()
    if not asked.table:
        try:
            available_device(asked.device, of="--device ")
        except CocktailError as error:
            parser.error(str(error))
    if asked.data is None and "COCKTAIL_DATA" in os.environ:
        asked.data = Path(os.environ["COCKTAIL_DATA"]) / "cifar10"
    console = Console(width=150)
    rows = read(asked.results)
    if not asked.table:
        if asked.data is None and not asked.trying:
            parser.error("--data FOLDER, or --try")
        if asked.minutes is not None:
            signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
            signal.setitimer(signal.ITIMER_REAL, 60 * asked.minutes)
        try:
            trainer, test = trainer_of(asked)
            net = trainer.fit()
        except KeyboardInterrupt:
            console.print("saved; the same command resumes")
            return 3
        signal.setitimer(signal.ITIMER_REAL, 0)
        device = torch.cuda.get_device_name() if asked.device.startswith("cuda") else platform.machine()
        row = {
            "task": "resnet18",
            "method": asked.recipe,
            "pattern": "try" if asked.trying else "all",
            "seed": asked.seed,
            "budget": trainer.history.steps,
            "epochs_scale": asked.epochs_scale,
            "steps": trainer.history.steps,
            "seconds": round(trainer.history.seconds, 1),
            "machine": f"{device}, torch {torch.__version__}",
            "command": " ".join(["python", "benchmarks/quality_gpu.py", *sys.argv[1:]]),
            "networks": {name: round(value, 5) for name, value in trainer.evaluate(test).items()},
            "alphas": trainer.history.alphas,
        }
        same = ("method", "pattern", "seed", "epochs_scale")
        rows = [r for r in rows if any(r[k] != row[k] for k in same)] + [row]
        write(rows, asked.results)
        console.print(json.dumps(net.metrics))
    console.print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
