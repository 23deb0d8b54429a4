"""Scores of whole layers: what they change of the stream, and the loss without them."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import cocktailsdk as cocktail


class Block(nn.Module):
    def __init__(self, strength: float) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)
        with torch.no_grad():
            self.down.weight.mul_(strength)
            self.down.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(self.norm(x)).relu())


class Stack(nn.Module):
    def __init__(self, strengths: tuple[float, ...]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(6, 8)
        self.blocks = nn.ModuleList([Block(s) for s in strengths])
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


STRENGTHS = (2.0, 0.1, 1.0, 0.02, 3.0)


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    model = Stack(STRENGTHS)
    inputs = [torch.randn(8, 6, generator=generator) for _ in range(2)]
    with torch.no_grad():
        return [(x, model(x).argmax(1)) for x in inputs]


def dropped(net: cocktail.CocktailNet, name: str) -> set[str]:
    return {n.split(".")[1] for n, m in net.mask_tensors(name).items() if n.endswith("up.weight") and not m.any()}


def test_the_layers_that_change_the_stream_least_go_first() -> None:
    model = Stack(STRENGTHS)
    before = {n: p.clone() for n, p in model.state_dict().items()}
    net = cocktail.sparsify(
        model, ["layers@0.2", "layers@0.4"], torch.zeros(2, 6), score="cosine", calibration=batches()
    )
    assert dropped(net, "layers@0.2") == {"3"}
    assert dropped(net, "layers@0.4") == {"1", "3"}
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())
    assert all(not m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("pattern", ["layers", "depth"])
def test_the_loss_chooses_as_trying_every_layer_would(pattern: str) -> None:
    data = batches()
    net = cocktail.sparsify(
        Stack(STRENGTHS),
        [f"{pattern}@0.2", f"{pattern}@0.6"],
        torch.zeros(2, 6),
        score="greedy",
        calibration=data,
        loss_fn=F.cross_entropy,
    )

    def loss(gone: set[str]) -> float:
        model = Stack(STRENGTHS).eval()
        model.blocks = nn.ModuleList([b for i, b in enumerate(model.blocks) if str(i) not in gone])
        with torch.no_grad():
            return sum(float(F.cross_entropy(model(x), y)) for x, y in data)

    gone: set[str] = set()
    for _ in range(3):
        gone = min(({*gone, str(i)} for i in range(5) if str(i) not in gone), key=loss)
        if len(gone) == 1:
            assert dropped(net, f"{pattern}@0.2") == gone
    assert dropped(net, f"{pattern}@0.6") == gone
    assert loss(gone) <= min(loss(set(map(str, c))) for c in combinations(range(5), 3)) * 1.5


def test_scores_and_patterns_that_do_not_go_together_are_named() -> None:
    def made(pattern: str, score: str) -> None:
        cocktail.sparsify(Stack(STRENGTHS), [pattern], torch.zeros(2, 6), score=score, calibration=batches())

    with pytest.raises(cocktail.PatternError, match="choose the pattern 'layers', or the score 'greedy'"):
        made("depth@0.2", "cosine")
    with pytest.raises(cocktail.PatternError, match="for layers, and the pattern 'unstructured' ranks elements"):
        made("unstructured@0.5", "greedy")
    with pytest.raises(cocktail.TrainingError, match="give loss_fn"):
        made("layers@0.2", "greedy")
