"""The pictures of docs/coupling.md: one unit of a small module, and all that goes with it.

    python docs/coupling_pictures.py     writes docs/assets/coupling-*.svg

What is coloured is what :func:`cocktailsdk.graph.prove.couple` finds in the module that is drawn.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from svg_parts import CELL, drawing, grid, text
from torch import Tensor, nn
from torch.nn import functional as F

from cocktailsdk.graph import Coupling
from cocktailsdk.graph.prove import couple

ASSETS = Path(__file__).resolve().parent / "assets"
LEFT, TOP, GAP = 20, 74, 64


class Chain(nn.Module):
    """Two convolutions, a norm between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 5, 3, padding=1)
        self.norm = nn.BatchNorm2d(5)
        self.second = nn.Conv2d(5, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """From images to maps."""
        return self.second(self.norm(self.first(x)).relu())


class Residual(nn.Module):
    """A block that adds to the stream that it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 5, 3, padding=1)
        self.block = nn.Conv2d(5, 5, 3, padding=1)
        self.head = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        """From images to scores."""
        x = self.stem(x)
        return self.head((x + self.block(x)).mean((2, 3)))


class Joined(nn.Module):
    """Two convolutions whose maps are concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Conv2d(3, 3, 1)
        self.right = nn.Conv2d(3, 4, 1)
        self.after = nn.Conv2d(7, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        """From images to maps."""
        return self.after(torch.cat([self.left(x), self.right(x)], 1).relu())


class Flattened(nn.Module):
    """A map of 2 x 2 that is flattened before a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.fc = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        """From images to scores."""
        return self.fc(self.conv(x).relu().flatten(1))


class Attention(nn.Module):
    """Three heads of two channels."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 3
        self.q, self.k, self.v = (nn.Linear(4, 6) for _ in range(3))
        self.out = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        """From tokens to tokens."""
        q, k, v = (layer(x).unflatten(-1, (self.heads, 2)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


@dataclass(frozen=True)
class Picture:
    """A module, and what is drawn of it.

    Attributes:
        name: Of the file.
        title: In a few words.
        told: In a sentence, for those who do not see it.
        module: Is coupled.
        x: Its input.
        maker: The weight whose unit goes, and the row.
        tensors: What is drawn, from left to right, with what stands before each.
    """

    name: str
    title: str
    told: str
    module: nn.Module
    x: Tensor
    maker: tuple[str, int]
    tensors: Sequence[tuple[str, str]]


def pictures() -> list[Picture]:
    """All of them."""
    image = torch.zeros(2, 3, 2, 2)
    return [
        Picture(
            "chain",
            "A channel between two convolutions",
            "Row 1 of first.weight, entry 1 of its bias and of the norm, and column 1 of second.weight go together.",
            Chain(),
            image,
            ("first.weight", 1),
            [
                ("first.weight", ""),
                ("first.bias", "+"),
                ("norm.weight", "·"),
                ("norm.bias", "+"),
                ("second.weight", "→"),
            ],
        ),
        Picture(
            "residual",
            "A channel of a residual stream",
            "Row 1 of stem.weight, row 1 and column 1 of block.weight, and column 1 of head.weight go together.",
            Residual(),
            image,
            ("stem.weight", 1),
            [("stem.weight", ""), ("block.weight", "→"), ("head.weight", "+ →")],
        ),
        Picture(
            "concat",
            "A channel that is concatenated",
            "Row 1 of right.weight goes with column 4 of after.weight: three columns stand before it.",
            Joined(),
            image,
            ("right.weight", 1),
            [("left.weight", ""), ("right.weight", "cat"), ("after.weight", "→")],
        ),
        Picture(
            "flatten",
            "A channel that is flattened",
            "Row 1 of conv.weight goes with columns 4 to 7 of fc.weight: one for each place of its map.",
            Flattened(),
            image,
            ("conv.weight", 1),
            [("conv.weight", ""), ("fc.weight", "flatten")],
        ),
        Picture(
            "heads",
            "A head of an attention",
            "Rows 2 and 3 of q, k and v go with columns 2 and 3 of out: a head goes as a whole.",
            Attention(),
            torch.zeros(2, 5, 4),
            ("q.weight", 2),
            [("q.weight", ""), ("k.weight", ""), ("v.weight", ""), ("out.weight", "→")],
        ),
    ]


def drawn(picture: Picture) -> str:
    """The file."""
    coupling = couple(picture.module.eval(), (picture.x,))
    gone, kept = _gone(coupling, picture), _kept(coupling)
    x, parts, lowest = LEFT, [], 0
    for name, before in picture.tensors:
        shape = tuple(picture.module.get_parameter(name).shape)
        rows, columns = shape[0], shape[1] if len(shape) > 1 else 1
        if before:
            parts.append(text(x + GAP / 2 - 8, TOP + 32, before, "faint", "middle"))
        x += GAP - 16 if before else 0

        def look(i: int, j: int, name: str = name) -> str:
            if bool(gone[name][i, j]):
                return 'class="gone"'
            return 'class="stays"' if i in kept.get(name, ()) else 'class="cell"'

        label = max(columns * CELL, 7.4 * len(name))
        parts += [text(x, TOP - 10, name, "code"), *grid(x, TOP, rows, columns, look)]
        lost = sorted(i for i in range(rows) if bool(gone[name][i].all()))
        across = sorted(j for j in range(columns) if columns > 1 and bool(gone[name][:, j].all()))
        what = [_told("row" if columns > 1 else "entry", lost)] if lost else []
        what += [_told("column", across)] if across else []
        parts += [text(x, TOP + rows * CELL + 14 + 15 * k, line, "faint") for k, line in enumerate(what or ["nothing"])]
        lowest, x = max(lowest, TOP + rows * CELL + 15 * max(len(what), 1)), x + round(label) + 14
    width = max(x + 8, 560)
    legend = lowest + 32
    parts = [text(LEFT, 28, picture.title, "big"), *parts]
    for at, kind, words in (
        (0, "gone", "goes with the unit"),
        (160, "cell", "belongs to others"),
        (310, "stays", "its row must stay: an output"),
    ):
        parts += [
            f'<rect class="{kind}" x="{LEFT + at}" y="{legend - 10}" width="11" height="11"/>',
            text(LEFT + at + 18, legend, words),
        ]
    return drawing(width, legend + 18, picture.title, picture.told, parts)


def _told(what: str, places: Sequence[int]) -> str:
    if len(places) == 1:
        return f"{what} {places[0]}"
    plural = what.replace("entry", "entrie") + "s"
    return (
        f"{plural} {places[0]} to {places[-1]}" if places[-1] - places[0] > 1 else f"{plural} {places[0]}, {places[-1]}"
    )


def _gone(coupling: Coupling, picture: Picture) -> dict[str, Tensor]:
    """For each drawn tensor, outputs by inputs, what goes with the unit; kernel positions are alike."""
    maker, row = picture.maker
    unit = next(int(p.units[row]) for p in coupling.producers if p.weight == maker)
    keep = coupling.masks(torch.arange(coupling.n_units) == unit)
    out = {}
    for name, _ in picture.tensors:
        shape = picture.module.get_parameter(name).shape
        gone = ~keep[name].expand(shape) if name in keep else torch.zeros(shape, dtype=torch.bool)
        out[name] = gone.reshape(shape[0], shape[1] if len(shape) > 1 else 1, -1)[:, :, 0]
    return out


def _kept(coupling: Coupling) -> dict[str, set[int]]:
    """Rows of weights that make what must stay: those that make no unit."""
    kept = {w.name: set(range(w.shape[w.out_axis])) for w in coupling.weights}
    for p in coupling.producers:
        kept[p.weight] -= {i for i, unit in enumerate(p.units.tolist()) if unit >= 0}
    return kept


def main() -> int:
    """Run as a script."""
    ASSETS.mkdir(parents=True, exist_ok=True)
    for picture in pictures():
        (ASSETS / f"coupling-{picture.name}.svg").write_text(drawn(picture), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
