"""Random networks made of common blocks: slim equals masked on all of them, with nothing pinned to make it so."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from test_graph_models import some_removed
from torch import nn

from cocktailsdk.graph import couple, slim_module


class Residual(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.a, self.bn, self.b = (
            nn.Conv2d(width, hidden, 3, padding=1),
            nn.BatchNorm2d(hidden),
            nn.Conv2d(hidden, width, 1),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.b(F.relu(self.bn(self.a(x))))


class Squeeze(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(width, hidden, 1), nn.Conv2d(hidden, width, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(self.b(F.silu(self.a(F.adaptive_avg_pool2d(x, 1)))))


class Grow(nn.Module):
    """A concatenation, as in DenseNet, brought back to the width."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(width, hidden, 1), nn.Conv2d(width + hidden, width, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.cat([x, F.gelu(self.a(x))], 1))


class Inverted(nn.Module):
    """Expand, depthwise, project; no activation that keeps zeros."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.a, self.d, self.b = (
            nn.Conv2d(width, hidden, 1),
            nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden),
            nn.Conv2d(hidden, width, 1),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.b(F.softplus(self.d(F.hardswish(self.a(x)))))


class Grouped(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.a, self.g, self.b = (
            nn.Conv2d(width, 2 * hidden, 1),
            nn.Conv2d(2 * hidden, 2 * hidden, 3, padding=1, groups=2),
            nn.Conv2d(2 * hidden, width, 1),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x - self.b(F.elu(self.g(self.a(x))))


class Shuffle(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(width, 2 * hidden, 1), nn.Conv2d(2 * hidden, width, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.a(x)
        n, c, h, w = y.shape
        return x + self.b(y.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w))


class Halves(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(width, 2 * hidden, 1), nn.Conv2d(hidden, width, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        p, q = self.a(x).chunk(2, 1)
        return torch.maximum(x, self.b(p * torch.tanh(q)))


class Normed(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm, self.a, self.b = nn.GroupNorm(1, width), nn.Conv2d(width, hidden, 1), nn.Conv2d(hidden, width, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.b(self.a(self.norm(x)).relu())


class ChannelsLast(nn.Module):
    """LayerNorm and two linear layers over channels last, as in ConvNeXt, with a scale of its own."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm, self.a, self.b = nn.LayerNorm(width), nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.b(F.gelu(self.a(self.norm(x.permute(0, 2, 3, 1))))) * self.gamma
        return x + y.permute(0, 3, 1, 2)


class Attend(nn.Module):
    """Self-attention over positions, with two heads."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.heads, self.head_dim = 2, hidden
        self.q, self.k, self.v = (nn.Linear(width, 2 * hidden) for _ in range(3))
        self.norm, self.o = nn.RMSNorm(width), nn.Linear(2 * hidden, width)
        self.position = nn.Parameter(torch.randn(1, 36, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, c, h, w = x.shape
        t = self.norm(x.flatten(2).transpose(1, 2) + self.position)
        q, k, v = (f(t).view(n, h * w, -1, self.head_dim).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, h * w, -1)
        return x + self.o(y).transpose(1, 2).reshape(n, c, h, w)


BLOCKS: list[Callable[[int, int], nn.Module]] = [
    Residual, Squeeze, Grow, Inverted, Grouped, Shuffle, Halves, Normed, ChannelsLast, Attend,
]  # fmt: skip


class Network(nn.Module):
    def __init__(self, width: int, blocks: list[tuple[int, int]], flat: bool) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 1)
        self.blocks = nn.Sequential(*(BLOCKS[i](width, hidden) for i, hidden in blocks))
        self.flat = flat
        self.head = nn.Linear(width * (36 if flat else 1), 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.blocks(self.stem(x))
        return self.head(x.flatten(1) if self.flat else x.mean((2, 3)))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    width=st.integers(3, 12),
    blocks=st.lists(st.tuples(st.integers(0, len(BLOCKS) - 1), st.integers(2, 9)), min_size=1, max_size=4),
    flat=st.booleans(),
    ratio=st.floats(0.1, 0.9),
    seed=st.integers(0, 3),
)
def test_random_networks(width: int, blocks: list[tuple[int, int]], flat: bool, ratio: float, seed: int) -> None:
    x = torch.randn(2, 3, 6, 6)
    model = Network(width, blocks, flat)
    coupling = couple(model, (x,), prove=False)
    assert not coupling.unknown_ops
    assert coupling.groups
    removed = some_removed(coupling, ratio, seed)
    slim = slim_module(model, coupling, removed, (x,))  # raises where slim is not masked
    assert sum(p.numel() for p in slim.parameters()) == coupling.params(removed)
