"""Blocks that random networks are made of: of any width and hidden width, giving back the shape that they are given."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IMAGES: list[Callable[[int, int], nn.Module]] = []
"""Blocks for (batch, width, 6, 6)."""

TOKENS: list[Callable[[int, int], nn.Module]] = []
"""Blocks for (batch, 6, width)."""


def image(cls: type[nn.Module]) -> type[nn.Module]:
    IMAGES.append(cls)
    return cls


def token(cls: type[nn.Module]) -> type[nn.Module]:
    TOKENS.append(cls)
    return cls


class Convolutions(nn.Module):
    """Convolutions of one position each from width to width, through others."""

    def __init__(self, *widths: int) -> None:
        super().__init__()
        self.conv = nn.ModuleList(nn.Conv2d(a, b, 1) for a, b in pairwise(widths))


@image
class Residual(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.a, self.bn = nn.Conv2d(width, hidden, 3, padding=1), nn.BatchNorm2d(hidden)
        self.b = nn.Conv2d(hidden, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(F.relu(self.bn(self.a(x))))


@image
class Squeeze(Convolutions):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__(width, hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.conv
        return x * torch.sigmoid(b(F.silu(a(F.adaptive_avg_pool2d(x, 1)))))


@image
class Grow(nn.Module):
    """A concatenation, as in DenseNet, brought back to the width."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(width, hidden, 1), nn.Conv2d(width + hidden, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.cat([x, F.gelu(self.a(x))], 1))


@image
class Inverted(nn.Module):
    """Expand, depthwise, project; no activation that keeps zeros."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(width, hidden, 1), nn.Conv2d(hidden, width, 1)
        self.d = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden, padding_mode="reflect")

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(F.softplus(self.d(F.hardswish(self.a(x)))))


@image
class Grouped(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(width, 2 * hidden, 1), nn.Conv2d(2 * hidden, width, 1)
        self.g = nn.Conv2d(2 * hidden, 2 * hidden, 3, padding=1, groups=2)
        self.t = nn.ConvTranspose2d(2 * hidden, 2 * hidden, 3, padding=1, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        return x - self.b(F.elu(self.t(self.g(self.a(x)))))


@image
class Shuffle(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(width, 2 * hidden, 1), nn.Conv2d(2 * hidden, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        n, c, h, w = y.shape
        return self.b(y.reshape(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w))


@image
class Halves(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(width, 2 * hidden, 1), nn.Conv2d(hidden, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        p, q = self.a(x).chunk(2, 1)
        return torch.maximum(x, self.b(p * torch.tanh(q)))


@image
class Unequal(nn.Module):
    """A run of channels goes on by itself, the rest is carried along."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.a, self.cut = nn.Conv2d(width, hidden + 2, 1), hidden
        self.b, self.c = nn.Conv2d(hidden, 3, 3, padding=1), nn.Conv2d(5, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.c(torch.cat([y[:, self.cut :], F.relu(self.b(y[:, : self.cut]))], 1))


@image
class Normed(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm, self.a, self.b = nn.GroupNorm(1, width), nn.Conv2d(width, hidden, 1), nn.Conv2d(hidden, width, 1)
        self.inner, self.slope = nn.InstanceNorm2d(hidden, affine=True), nn.PReLU(hidden)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(self.slope(self.inner(self.a(self.norm(x)))))


@image
class ChannelsLast(nn.Module):
    """LayerNorm and two linear layers over channels last, as in ConvNeXt, with a scale of its own."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm, self.a, self.b = nn.LayerNorm(width), nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(F.gelu(self.a(self.norm(x.permute(0, 2, 3, 1))))) * self.gamma
        return x + y.permute(0, 3, 1, 2)


@image
class Hourglass(nn.Module):
    """Down by a stride, up by a transposed convolution of each channel's own and by interpolation."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.down, self.out = nn.Conv2d(width, hidden, 3, stride=2, padding=1), nn.Conv2d(2 * hidden, width, 1)
        self.up = nn.ConvTranspose2d(hidden, hidden, 2, stride=2, groups=hidden)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.down(x))
        return x + self.out(torch.cat([self.up(y), F.interpolate(y, scale_factor=2.0)], 1))


@image
class Folded(nn.Module):
    """Positions to channels and back."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(4 * width, 4 * hidden, 1), nn.Conv2d(hidden, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.pixel_shuffle(F.relu(self.a(F.pixel_unshuffle(x, 2))), 2))


@image
class Shared(nn.Module):
    """One convolution called for both of two sums, and copies of channels side by side."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(width, hidden, 1), nn.Conv2d(2 * hidden, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b((self.a(x) + self.a(x.flip(-1)).abs()).repeat(1, 2, 1, 1)).add_(x)


@image
class Standardised(nn.Module):
    """A gate by the mean over channels, a kernel standardised by its own fan-in."""

    class Conv(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            w = self.weight.reshape(1, self.out_channels, -1)
            w = F.batch_norm(w, None, None, training=True, momentum=0.0).reshape_as(self.weight)
            return F.conv2d(x, w, self.bias, padding=1)

    class Gate(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * torch.sigmoid(x.mean(1, keepdim=True) + x.var(1, keepdim=True, unbiased=False))

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.a, self.gate, self.b = self.Conv(width, hidden, 3), self.Gate(), nn.Conv2d(hidden, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(self.gate(self.a(x)))


@image
class Frequencies(nn.Module):
    """Mixed over space by its Fourier transform."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(width, hidden, 1), nn.Conv2d(hidden, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.fft.irfft2(torch.fft.rfft2(self.a(x)) * 0.5, s=x.shape[-2:])
        return x + self.b(y.roll(1, -1))


@image
class AttendPositions(nn.Module):
    """Self-attention over positions, with two heads."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.heads, self.head_dim = 2, hidden
        self.q, self.k, self.v = (nn.Linear(width, 2 * hidden) for _ in range(3))
        self.norm, self.o = nn.RMSNorm(width), nn.Linear(2 * hidden, width)
        self.position = nn.Parameter(torch.randn(1, 36, width))

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        t = self.norm(x.flatten(2).transpose(1, 2) + self.position)
        q, k, v = (f(t).view(n, h * w, -1, self.head_dim).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, h * w, -1)
        return x + self.o(y).transpose(1, 2).reshape(n, c, h, w)


@token
class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm, self.a, self.b = nn.LayerNorm(width), nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(F.gelu(self.a(self.norm(x))))


@token
class Gated(nn.Module):
    """Both halves from one weight, behind a norm in pieces."""

    class Norm(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(width))

        def forward(self, x: Tensor) -> Tensor:
            return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm, self.a, self.b = self.Norm(width), nn.Linear(width, 2 * hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.a(self.norm(x)).chunk(2, -1)
        return x + self.b(F.silu(a) * b)


@token
class Attend(nn.Module):
    """Three heads, rotated, of normalised queries and keys, with a bias for each head."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.head_dim = 2 * ((hidden + 1) // 2)
        self.q, self.k, self.v = (nn.Linear(width, 3 * self.head_dim) for _ in range(3))
        self.norm, self.o = nn.RMSNorm(self.head_dim), nn.Linear(3 * self.head_dim, width)
        self.bias = nn.Parameter(torch.randn(3, 6, 6))
        t = torch.arange(6.0)[:, None] * torch.arange(1, self.head_dim // 2 + 1)
        self.register_buffer("cos", t.cos().repeat(1, 2))
        self.register_buffer("sin", t.sin().repeat(1, 2))

    def rotate(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return x * self.cos + torch.cat([-b, a], -1) * self.sin

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for f in (self.q, self.k, self.v))
        scores = self.rotate(self.norm(q)) @ self.rotate(self.norm(k)).mT * self.head_dim**-0.5
        return x + self.o(((scores + self.bias).softmax(-1) @ v).transpose(1, 2).flatten(2))


@token
class Queries(nn.Module):
    """Four query heads that share two key heads, packed unequally."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.head_dim, self.sizes = hidden, [4 * hidden, 2 * hidden, 2 * hidden]
        self.qkv, self.o = nn.Linear(width, 8 * hidden), nn.Linear(4 * hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(x).split(self.sizes, -1)
        q, k, v = (t.view(*t.shape[:2], -1, self.head_dim).transpose(1, 2) for t in parts)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return x + self.o(y.transpose(1, 2).flatten(2))


@token
class Packed(nn.Module):
    """Heads computed from the width of the input, as in many vision transformers."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.num_heads, self.inner = 2, nn.Linear(width, 2 * hidden)
        self.qkv, self.o = nn.Linear(2 * hidden, 6 * hidden), nn.Linear(2 * hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        b, n, c = y.shape
        qkv = self.qkv(y).reshape(b, n, 3, self.num_heads, c // self.num_heads).permute(2, 0, 3, 1, 4)
        scores = (qkv[0] @ qkv[1].transpose(-2, -1)) * (c // self.num_heads) ** -0.5
        return x + self.o((scores.softmax(-1) @ qkv[2]).transpose(1, 2).reshape(b, n, c))


@token
class PyTorchs(nn.Module):
    """PyTorch's own attention, in a width of its own."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(width, 2 * hidden), nn.Linear(2 * hidden, width)
        self.attn = nn.MultiheadAttention(2 * hidden, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return x + self.b(self.attn(y, y, y)[0])


@token
class Mixer(nn.Module):
    """Tokens mixed like channels."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm, self.a, self.b = nn.LayerNorm(width, bias=False), nn.Linear(6, hidden), nn.Linear(hidden, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(F.gelu(self.a(self.norm(x).transpose(1, 2)))).transpose(1, 2)


@token
class Experts(nn.Module):
    """Three experts in one tensor, mixed by a gate."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, 3)
        self.up, self.down = nn.Parameter(torch.randn(3, width, hidden)), nn.Parameter(torch.randn(3, hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        y = F.gelu(torch.einsum("bnc,ech->bneh", x, self.up))
        return x + torch.einsum("bneh,ehc,bne->bnc", y, self.down, self.gate(x).softmax(-1))


@token
class Recurrent(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.lstm, self.out = nn.LSTM(width, hidden, batch_first=True, bidirectional=True), nn.Linear(2 * hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(self.lstm(x)[0])


@token
class Convolved(nn.Module):
    """A depthwise convolution over the sequence, between pointwise ones."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.a, self.b = nn.Conv1d(width, 2 * hidden, 1), nn.Conv1d(hidden, width, 1)
        self.d, self.norm = nn.Conv1d(hidden, hidden, 3, padding=1, groups=hidden), nn.BatchNorm1d(hidden)

    def forward(self, x: Tensor) -> Tensor:
        y = F.glu(self.a(x.transpose(1, 2)), 1)
        return x + self.b(F.silu(self.norm(self.d(y)))).transpose(1, 2)
