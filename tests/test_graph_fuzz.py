"""Random networks made of common blocks: slim equals masked on all of them, with nothing pinned to make it so.

The variable COCKTAIL_EXAMPLES sets how many are drawn by each test.
"""

from __future__ import annotations

import os

import torch
from graph_blocks import IMAGES, TOKENS
from graph_cases import assert_equal
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_graph_models import some_removed
from torch import nn

from cocktailsdk.graph import couple

EXAMPLES = int(os.environ.get("COCKTAIL_EXAMPLES", "32"))
fuzz = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize="COCKTAIL_EXAMPLES" not in os.environ,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


def chosen(count: int) -> st.SearchStrategy[list[tuple[int, int]]]:
    """Blocks with their hidden widths."""
    return st.lists(st.tuples(st.integers(0, count - 1), st.integers(2, 9)), min_size=1, max_size=3)


class Images(nn.Module):
    def __init__(self, width: int, blocks: list[tuple[int, int]], flat: bool) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 1)
        self.blocks = nn.Sequential(*(IMAGES[i](width, hidden) for i, hidden in blocks))
        self.flat = flat
        self.head = nn.Linear(width * (36 if flat else 1), 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.blocks(self.stem(x))
        return self.head(x.flatten(1) if self.flat else x.mean((2, 3)))


class Sequences(nn.Module):
    def __init__(self, width: int, blocks: list[tuple[int, int]], tied: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, width)
        self.blocks = nn.Sequential(*(TOKENS[i](width, hidden) for i, hidden in blocks))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 7, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.blocks(self.embed(x))))


def slims(model: nn.Module, x: torch.Tensor, ratio: float, seed: int) -> None:
    coupling = couple(model, (x,), prove=False)
    assert not coupling.unknown_ops
    assert coupling.groups
    assert_equal(model, coupling, some_removed(coupling, ratio, seed), (x,))  # raises, too, where slim is not masked


@fuzz
@given(
    width=st.integers(3, 12),
    blocks=chosen(len(IMAGES)),
    flat=st.booleans(),
    ratio=st.floats(0.1, 0.9),
    seed=st.integers(0, 3),
)
def test_random_networks_of_images(
    width: int, blocks: list[tuple[int, int]], flat: bool, ratio: float, seed: int
) -> None:
    torch.manual_seed(seed)
    slims(Images(width, blocks, flat), torch.randn(2, 3, 6, 6), ratio, seed)


@fuzz
@given(
    width=st.integers(3, 12),
    blocks=chosen(len(TOKENS)),
    tied=st.booleans(),
    ratio=st.floats(0.1, 0.9),
    seed=st.integers(0, 3),
)
def test_random_networks_of_sequences(
    width: int, blocks: list[tuple[int, int]], tied: bool, ratio: float, seed: int
) -> None:
    torch.manual_seed(seed)
    slims(Sequences(width, blocks, tied), torch.randint(0, 7, (2, 6)), ratio, seed)
