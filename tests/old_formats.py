"""Bundles, run states and a loop's state from before masks had one encoder: this made ``data/old_formats``.

``python tests/old_formats.py FOLDER``, with a package of commit 3ca953a or older on the path, writes them. Beside each
lies ``expected.safetensors``: the same masks and weights as plain tensors, for comparison bit by bit.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

import cocktailsdk as cocktail

DATA = Path(__file__).parent / "data" / "old_formats"


class Convolutions(nn.Module):
    """Two convolutions with batch norm, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm_a = nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.b, self.norm_b = nn.Conv2d(8, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.last = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm_a(self.a(x)))
        x = F.relu(self.norm_b(self.b(x)))
        return self.last(x.mean((2, 3)))


class Transformer(nn.Module):
    """One layer of four heads, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 16)
        layer = nn.TransformerEncoderLayer(16, 4, 24, dropout=0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.last = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.layers(self.first(x[:, 0])).mean(1))


PATTERNS: dict[str, list[Any]] = {
    "convolutions": [
        cocktail.Unstructured(sparsities=[0.3, 0.5, 0.7, 0.8]),
        "1:2",
        cocktail.Channel(sparsities=[0.25, 0.5], round_to=1),
        "block2x2@0.5",
        "channel@0.25+2:4",
    ],
    "transformer": [
        cocktail.Unstructured(sparsities=[0.4, 0.6]),
        cocktail.Heads(sparsities=[0.25, 0.5]),
        cocktail.Depth(sparsities=[0.5]),
        "transposable2:4",
    ],
}


def net_of(name: str) -> cocktail.CocktailNet:
    """A net with its masks made of random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = {"convolutions": Convolutions, "transformer": Transformer}[name]()
    return cocktail.sparsify(model, PATTERNS[name], example_inputs=(torch.zeros(2, 1, 8, 8),))


def batches(count: int = 4) -> list[tuple[Tensor, Tensor]]:
    """The same random images and classes each time."""
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(8, 1, 8, 8, generator=generator), torch.randint(0, 4, (8,), generator=generator))
        for _ in range(count)
    ]


def sgd(parameters: Any) -> torch.optim.Optimizer:
    """Plain SGD, which keeps nothing of a parameter."""
    return torch.optim.SGD(parameters, lr=0.05)


RUNS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "default-run": ("convolutions", "RoundStarted 4", {"epochs": 1}),
    "paper-run": ("transformer", "AlphaChosen 2", {"epochs": 1, "recipe": "paper"}),
}
"""By folder: the net, the event and round at which the run is interrupted, and the trainer's arguments."""


def trainer_of(run: str, out: Path, callback: Callable[[Any], None]) -> cocktail.CoTrainer:
    """A run that writes its state to a folder."""
    name, _, arguments = RUNS[run]
    return cocktail.CoTrainer(
        net_of(name), batches(), F.cross_entropy, val_loader=batches(2), optimizer=sgd, out_dir=out,
        callbacks=[callback], **arguments,
    )  # fmt: skip


def loop_of(net: cocktail.CocktailNet) -> cocktail.CoLoop:
    """A loop of somebody's own."""
    return cocktail.CoLoop(net, steps=24)


def contents(net: cocktail.CocktailNet) -> dict[str, Tensor]:
    """The masks and dense weights of a net, as plain tensors."""
    out = {f"weights/{name}": tensor.detach().clone() for name, tensor in net.model.state_dict().items()}
    for name, mask in net.masks.items():
        out |= {f"masks/{name}/elements/{key}": keep.clone() for key, keep in mask.elements.items()}
        if mask.removed is not None:
            out[f"masks/{name}/removed"] = mask.removed.clone()
    return {name: tensor.contiguous() for name, tensor in out.items()}


def stop_at(moment: str) -> Callable[[Any], None]:
    """A callback that interrupts a run at an event of a round."""

    def callback(event: Any) -> None:
        if f"{type(event).__name__} {getattr(event, 'round', '')}" == moment:
            raise KeyboardInterrupt

    return callback


def _write(folder: Path) -> None:
    for name in PATTERNS:
        net = net_of(name)
        net.save_pretrained(folder / f"{name}-bundle")
        save_file(contents(net), folder / f"{name}-bundle" / "expected.safetensors")
    for run, (_, moment, _) in RUNS.items():
        trainer = trainer_of(run, folder / run, stop_at(moment))
        try:
            trainer.fit()
            raise AssertionError(f"{run} was not interrupted")
        except KeyboardInterrupt:
            pass
        *old, _ = sorted((folder / run / "state").glob("state-*.pt"))
        for path in (*old, folder / run / "state" / "lock"):
            path.unlink()
        save_file(contents(trainer.net), folder / run / "expected.safetensors")
    net = net_of("convolutions")
    loop, optimizer = loop_of(net), sgd(net.model.parameters())
    for x, y in batches(4) * 2:
        with loop.step((x, y)) as step:
            output = net.model(x)
            optimizer.zero_grad()
            step.loss(F.cross_entropy(output, y), output, y).backward()
        optimizer.step()
    torch.save(loop.state_dict(), folder / "loop.pt")
    save_file(contents(net), folder / "loop.safetensors")


if __name__ == "__main__":
    import old_formats  # under its own name, which runs record

    shutil.rmtree(sys.argv[1], ignore_errors=True)
    Path(sys.argv[1]).mkdir(parents=True)
    old_formats._write(Path(sys.argv[1]))
