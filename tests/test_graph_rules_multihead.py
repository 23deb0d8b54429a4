"""PyTorch's own attention and transformer layers, which take the width of a head from that of the stream."""

from __future__ import annotations

import pytest
import torch
from graph_cases import TOKENS, Table, Tokens, show
from torch import nn

case = CASES = Table()


@case(TOKENS, [16, 4])
class PyTorchsOwn(Tokens):
    """nn.MultiheadAttention, whose parameters are packed and whose heads are an attribute."""

    def __init__(self) -> None:
        super().__init__(16)
        self.attn = nn.MultiheadAttention(16, 4, batch_first=True)

    def body(self, x):
        return x + self.attn(x, x, x, need_weights=False)[0]


@case(TOKENS, [16, 4])
class PyTorchsOwnWithBiases(Tokens):
    """A key and a value of its own after those given, and weights averaged over heads that nobody reads."""

    def __init__(self) -> None:
        super().__init__(16)
        self.attn = nn.MultiheadAttention(16, 4, add_bias_kv=True)

    def body(self, x):
        return x + self.attn(x, x, x, attn_mask=torch.ones(x.shape[0], x.shape[0]).triu(1).bool())[0]


@case(((2, 6, 12), (2, 9, 7), (2, 9, 5)), [16, 4])
class PyTorchsOwnWithWidths(nn.Module):
    """Keys and values of other widths than queries."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(12, 16), nn.Linear(16, 3)
        self.attn = nn.MultiheadAttention(16, 4, kdim=7, vdim=5, batch_first=True)

    def forward(self, x, k, v):
        x = self.first(x)
        return self.last((x + self.attn(x, k, v)[0]).mean(1))


@case(TOKENS, [16], {"attn.in_proj_weight": "mean"})
class PyTorchsOwnWithWeights(Tokens):
    """Weights averaged over heads that are read: absent heads would count."""

    def __init__(self) -> None:
        super().__init__(16)
        self.attn = nn.MultiheadAttention(16, 4)

    def body(self, x):
        y, weights = self.attn(x, x, x)
        return x + y * weights.mean()


@case(TOKENS, [16, 4, 24])
class PyTorchsOwnLayer(Tokens):
    def __init__(self) -> None:
        super().__init__(16)
        self.layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True)

    def body(self, x):
        return self.layer(x)


@case(TOKENS, [16, 4, 24])
class PyTorchsOwnLayerNormFirst(Tokens):
    def __init__(self) -> None:
        super().__init__(16)
        self.layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True, norm_first=True, activation="gelu")

    def body(self, x):
        return self.layer(x)


@case(((2, 6, 12), (2, 5, 10)), [16, 4, 4, 24])
class PyTorchsOwnDecoder(nn.Module):
    """One packed weight reads both streams, which so are tied."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(12, 16), nn.Linear(10, 16), nn.Linear(16, 3)
        self.layer = nn.TransformerDecoderLayer(16, 4, 24, batch_first=True)

    def forward(self, x, memory):
        return self.last(self.layer(self.first(x), self.second(memory)).mean(1))


@pytest.mark.parametrize("name", list(CASES))
def test_rule(name: str) -> None:
    show(CASES[name])
