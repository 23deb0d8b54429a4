"""Attention that knows positions: turned, sloped, tabled, in windows."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from graph_cases import TOKENS, Heads, Streamed, Table, Tokens, show
from torch import nn

case = CASES = Table()


@case(TOKENS, [16, 4])
class Rotary(Streamed):
    class inner(Heads):
        def __init__(self) -> None:
            super().__init__()
            t = torch.arange(6.0)[:, None] * torch.arange(1, 3)
            self.register_buffer("cos", t.cos().repeat(1, 2))
            self.register_buffer("sin", t.sin().repeat(1, 2))

        def rotate(self, x):
            a, b = x.chunk(2, -1)
            return x * self.cos + torch.cat([-b, a], -1) * self.sin

        def attend(self, q, k, v):
            return F.scaled_dot_product_attention(self.rotate(q), self.rotate(k), v)


@case(TOKENS, [16, 4])
class RotaryInterleaved(Streamed):
    """Even and odd channels are the two parts of a number."""

    class inner(Heads):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("angle", torch.arange(6.0)[:, None] * torch.arange(1, 3))

        def rotate(self, x):
            a, b = x[..., ::2], x[..., 1::2]
            cos, sin = self.angle.cos(), self.angle.sin()
            return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)

        def attend(self, q, k, v):
            return F.scaled_dot_product_attention(self.rotate(q), self.rotate(k), v)


@case(TOKENS, [16, 4])
class RotaryComplex(Streamed):
    """The same by complex numbers."""

    class inner(RotaryInterleaved.inner):
        def rotate(self, x):
            pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
            return torch.view_as_real(pairs * torch.polar(torch.ones_like(self.angle), self.angle)).flatten(-2)


@case(TOKENS, [16, 4])
class PartlyRotary(Streamed):
    """Only the first half of each head turns."""

    class inner(Rotary.inner):
        def rotate(self, x):
            turned, rest = x[..., :2], x[..., 2:]
            a, b = turned.chunk(2, -1)
            turned = turned * self.cos[:, :2] + torch.cat([-b, a], -1) * self.sin[:, :2]
            return torch.cat([turned, rest], -1)


@case(TOKENS, [16, 2])
class GroupedQueryRotaryExpanded(Tokens):
    """Two key heads for four query heads, rotary tables: a unit is a key head and its two query heads."""

    def __init__(self) -> None:
        super().__init__(16)
        self.q, self.k, self.v, self.o = nn.Linear(16, 32), nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(32, 16)
        self.head_dim = 8
        t = torch.arange(6).float()[:, None] * torch.arange(1, 5).float()
        self.register_buffer("cos", t.cos().repeat(1, 2))
        self.register_buffer("sin", t.sin().repeat(1, 2))

    def rotate(self, x):
        a, b = x.chunk(2, -1)
        return x * self.cos + torch.cat([-b, a], -1) * self.sin

    def body(self, x):
        b, n, _ = x.shape
        q, k, v = (f(x).view(b, n, -1, self.head_dim).transpose(1, 2) for f in (self.q, self.k, self.v))
        k, v = (
            t[:, :, None].expand(b, t.shape[1], 2, n, self.head_dim).reshape(b, -1, n, self.head_dim) for t in (k, v)
        )
        y = F.scaled_dot_product_attention(self.rotate(q), self.rotate(k), v)
        return x + self.o(y.transpose(1, 2).reshape(b, n, -1))


@case(TOKENS, [16, 4])
class Alibi(Streamed):
    """A slope for each head, in a buffer that loses entries."""

    class inner(Heads):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("slopes", torch.tensor([0.5, 0.25, 0.125, 0.0625]))

        def attend(self, q, k, v):
            t = torch.arange(q.shape[-2])
            distance = (t[None] - t[:, None]).abs()
            bias = -self.slopes[:, None, None] * distance
            return F.scaled_dot_product_attention(q, k, v, attn_mask=bias.expand(q.shape[0], -1, -1, -1))


@case(TOKENS, [16, 4])
class RelativePositionTable(Streamed):
    """A bias for each head and distance (Swin): the table loses columns."""

    class inner(Heads):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(11, 4))
            self.register_buffer("index", torch.arange(6)[:, None] - torch.arange(6) + 5)

        def attend(self, q, k, v):
            bias = self.table[self.index.view(-1)].view(6, 6, -1).permute(2, 0, 1).contiguous()
            return ((q @ k.mT) * 0.5 + bias.unsqueeze(0)).softmax(-1) @ v


@case(TOKENS, [16, 4])
class RelativePositionEmbedding(Streamed):
    """The same with an embedding (T5)."""

    class inner(Heads):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Embedding(11, 4)

        def attend(self, q, k, v):
            t = torch.arange(q.shape[-2])
            bias = self.bias(t[None] - t[:, None] + 5).permute(2, 0, 1)
            return F.scaled_dot_product_attention(q, k, v, bias[None], scale=1.0)


@case(lambda: (torch.randn(2, 8, 8, 12),), [16, 4])
class ShiftedWindows(nn.Module):
    """Windows, rolled, with a mask between those that do not touch."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.attn, self.last = nn.Linear(12, 16), self.inner(), nn.Linear(16, 3)

    class inner(Heads):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mask", torch.where(torch.rand(4, 16, 16) > 0.5, 0.0, -100.0))

        def attend(self, q, k, v):
            b, h, n, _ = q.shape
            scores = (q @ k.mT).view(b // 4, 4, h, n, n) + self.mask[:, None]
            return scores.view(b, h, n, n).softmax(-1) @ v

    def forward(self, x):
        x = self.first(x)
        b, h, w, c = x.shape
        y = torch.roll(x, (-2, -2), (1, 2)).view(b, h // 4, 4, w // 4, 4, c).permute(0, 1, 3, 2, 4, 5)
        y = self.attn(y.reshape(-1, 16, c)).view(b, h // 4, w // 4, 4, 4, -1).permute(0, 1, 3, 2, 4, 5)
        return self.last((x + torch.roll(y.reshape(b, h, w, c), (2, 2), (1, 2))).mean((1, 2)))


@case((2, 6, 12), [16, 4, 24])
class VisionTransformer(Tokens):
    """A class token, learned positions, LayerScale, a pooled head."""

    def __init__(self) -> None:
        super().__init__(16)
        self.token, self.position = nn.Parameter(torch.randn(1, 1, 16)), nn.Parameter(torch.randn(1, 7, 16))
        self.n, self.m, self.norm = nn.LayerNorm(16), nn.LayerNorm(16), nn.LayerNorm(16)
        self.attn, self.a, self.b = Heads(), nn.Linear(16, 24), nn.Linear(24, 16)
        self.ls1, self.ls2 = nn.Parameter(torch.ones(16)), nn.Parameter(torch.ones(16))

    def body(self, x):
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.position
        x = x + self.ls1 * self.attn(self.n(x))
        x = x + self.ls2 * self.b(F.gelu(self.a(self.m(x))))
        return self.norm(x)[:, :1]


@pytest.mark.parametrize("name", list(CASES))
def test_rule(name: str) -> None:
    show(CASES[name])
