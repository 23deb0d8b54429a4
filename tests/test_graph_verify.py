"""A deliberately wrong mend is caught by the verification, and named."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cocktailsdk.errors import SlimError
from cocktailsdk.graph import couple, slim_module
from cocktailsdk.graph.cut import Cutter
from cocktailsdk.graph.verify import verify_slim


class Attention(nn.Module):
    def __init__(self, dim: int = 16, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.head_dim, self.scale = heads, dim // heads, (dim // heads) ** -0.5
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        attn = (q @ k.transpose(-2, -1) * self.scale).softmax(-1)
        return self.proj((attn @ v).transpose(1, 2).reshape(b, n, -1))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 16)
        self.norm = nn.LayerNorm(16)
        self.attn = Attention()
        self.fc1, self.fc2 = nn.Linear(16, 32), nn.Linear(32, 16)
        self.head = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        x = x + self.attn(self.norm(x))
        x = x + self.fc2(F.gelu(self.fc1(x)))
        return self.head(x.mean(1))


def wrong_scale(slim: nn.Module) -> None:
    slim.attn.scale *= 1.01


def swapped_heads(slim: nn.Module) -> None:
    w = slim.attn.proj.weight.data
    slim.attn.proj.weight.data = w.roll(slim.attn.head_dim, dims=1)


def one_channel_out_of_order(slim: nn.Module) -> None:
    w = slim.fc2.weight.data
    order = torch.arange(w.shape[1])
    order[0], order[1] = 1, 0
    slim.fc2.weight.data = w[:, order]


def forgotten_zeros(slim: nn.Module) -> None:
    slim.norm.channels = slim.norm.weight.numel()


def wrong_heads(slim: nn.Module) -> None:
    slim.attn.heads, slim.attn.head_dim = slim.attn.head_dim, slim.attn.heads


@pytest.mark.parametrize("harm", [wrong_scale, swapped_heads, one_channel_out_of_order, forgotten_zeros, wrong_heads])
def test_a_wrong_mend_is_caught(harm: Callable[[nn.Module], None]) -> None:
    model, x = Net(), torch.randn(2, 6, 8)
    coupling = couple(model, (x,))
    removed = torch.zeros(coupling.n_units, dtype=torch.bool)
    for g in coupling.groups:
        removed[g.start : g.start + g.size // 2] = True

    right = verify_slim(model, Cutter(coupling, coupling.trace, removed), (x,)).mends

    class Wrong(Cutter):
        def cut(self, model, mends=None):
            slim, _ = super().cut(model, right)
            harm(slim)
            return slim, {}  # nothing is left to settle

    with pytest.raises(SlimError, match=r"relative error|does not run"):
        verify_slim(model, Wrong(coupling, coupling.trace, removed), (x,))


def test_bad_masks_are_refused() -> None:
    model, x = Net(), torch.randn(2, 6, 8)
    coupling = couple(model, (x,))
    with pytest.raises(SlimError, match="channel units"):
        slim_module(model, coupling, torch.zeros(3, dtype=torch.bool), (x,))
    with pytest.raises(SlimError, match="at least one of each group"):
        slim_module(model, coupling, torch.ones(coupling.n_units, dtype=torch.bool), (x,))
    with pytest.raises(SlimError, match="example inputs"):
        slim_module(model, coupling, torch.zeros(coupling.n_units, dtype=torch.bool))
