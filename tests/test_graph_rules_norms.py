"""Norms: each channel by itself, over all channels with the absent zeros counted, over groups, of weights."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from graph_cases import IMAGE, TOKENS, Ends, Table, Tokens, show
from torch import nn

case = CASES = Table()


class Stream(Tokens):
    """A residual stream with one MLP behind a norm."""

    norm_of: type[nn.Module]

    def __init__(self) -> None:
        super().__init__(16)
        self.norm, self.a, self.b = self.norm_of(), nn.Linear(16, 24), nn.Linear(24, 16)

    def body(self, x):
        return x + self.b(F.gelu(self.a(self.norm(x))))


def layer_norm(**kwargs: bool) -> type[nn.Module]:
    class Norm(nn.LayerNorm):
        def __init__(self) -> None:
            super().__init__(16, **kwargs)

    return Norm


@case(TOKENS, [16, 24])
class LayerNormStream(Stream):
    norm_of = layer_norm()


@case(TOKENS, [16, 24])
class LayerNormWithoutBias(Stream):
    norm_of = layer_norm(bias=False)


@case(TOKENS, [16, 24])
class LayerNormWithoutAffine(Stream):
    norm_of = layer_norm(elementwise_affine=False)


@case(TOKENS, [16, 24])
class RmsNormStream(Stream):
    class norm_of(nn.RMSNorm):
        def __init__(self) -> None:
            super().__init__(16)


@case(TOKENS, [16, 24])
class RmsNormInPieces(Stream):
    """The mean over channels goes on dividing by how many there were."""

    class norm_of(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.ones(16)), 1e-6

        def forward(self, x):
            dtype = x.dtype
            x = x.to(torch.float64)
            variance = x.pow(2).mean(-1, keepdim=True)
            return self.weight * (x * torch.rsqrt(variance + self.eps)).to(dtype)


@case(TOKENS, [16, 24])
class RmsNormBySum(Stream):
    """Divided by the root of a width that is an attribute, which stays what it was."""

    class norm_of(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.scale = nn.Parameter(torch.ones(16)), 16**0.5

        def forward(self, x):
            return F.normalize(x, dim=-1) * self.scale * self.weight


@case(TOKENS, [16, 24])
class LayerNormInPieces(Stream):
    """Mean and variance by hand: centred channels are not zero, but their mean square counts the absent ones."""

    class norm_of(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.ones(16)), nn.Parameter(torch.zeros(16))

        def forward(self, x):
            mean = x.mean(-1, keepdim=True)
            variance = (x - mean).pow(2).mean(-1, keepdim=True)
            return (x - mean) / torch.sqrt(variance + 1e-6) * self.weight + self.bias


@case(TOKENS, [16, 12, 24])
class AdaptiveNorm(nn.Module):
    """A norm without parameters whose scale and shift are made from a condition (DiT)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(12, 16), nn.Linear(16, 3)
        self.hidden, self.modulation = nn.Linear(12, 12), nn.Linear(12, 48)
        self.norm, self.a, self.b = nn.LayerNorm(16, elementwise_affine=False), nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x):
        shift, scale, gate = self.modulation(F.silu(self.hidden(x.mean(1)))).unsqueeze(1).chunk(3, -1)
        x = self.first(x)
        y = self.b(F.gelu(self.a(self.norm(x) * (1 + scale) + shift)))
        return self.last((x + gate * y).mean(1))


@case(IMAGE, [4])
class GroupNormalised(Ends):
    """Whole groups go: each has its own statistics."""

    def __init__(self) -> None:
        super().__init__(16)
        self.norm = nn.GroupNorm(4, 16)

    def body(self, x):
        return self.norm(x)


@case(IMAGE, [4, 12])
class GroupNormStream(Ends):
    def __init__(self) -> None:
        super().__init__(16)
        self.norm, self.a, self.b = nn.GroupNorm(4, 16), nn.Conv2d(16, 12, 3, padding=1), nn.Conv2d(12, 16, 1)

    def body(self, x):
        return x + self.b(F.silu(self.a(F.silu(self.norm(x)))))


@case(IMAGE, [16])
class GroupNormOfOneGroup(Ends):
    def __init__(self) -> None:
        super().__init__(16)
        self.norm = nn.GroupNorm(1, 16)

    def body(self, x):
        return self.norm(x)


@case(IMAGE, [16])
class GroupNormOfSingles(Ends):
    """As many groups as channels: each channel by itself."""

    def __init__(self) -> None:
        super().__init__(16)
        self.norm = nn.GroupNorm(16, 16)

    def body(self, x):
        return F.relu(self.norm(x))


@case(IMAGE, [16, 12])
class InstanceNormalised(Ends):
    def __init__(self) -> None:
        super().__init__(16, 12)
        self.plain, self.conv = nn.InstanceNorm2d(16), nn.Conv2d(16, 12, 3)
        self.affine = nn.InstanceNorm2d(12, affine=True, track_running_stats=True)

    def body(self, x):
        return self.affine(self.conv(F.relu(self.plain(x))))


@case(IMAGE, [16, 24])
class NormOverChannelsFirst(Ends):
    """LayerNorm over the channels of images, moved to the end and back inside one module."""

    class Norm(nn.LayerNorm):
        def forward(self, x):
            x = F.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps)
            return x.permute(0, 3, 1, 2)

    def __init__(self) -> None:
        super().__init__(16)
        self.norm, self.a, self.b = self.Norm(16), nn.Conv2d(16, 24, 1), nn.Conv2d(24, 16, 1)

    def body(self, x):
        return x + self.b(F.gelu(self.a(self.norm(x))))


@case(IMAGE, [8], {"first.weight": "layer_norm"})
class NormOverPositionsToo(Ends):
    """Statistics over channels and positions, with a weight for each of them: the channels stay, the next ones go."""

    def __init__(self) -> None:
        super().__init__(6, 8)
        self.norm, self.conv = nn.LayerNorm((6, 8, 8)), nn.Conv2d(6, 8, 1)

    def body(self, x):
        return self.conv(self.norm(x))


@case(IMAGE, [8], {"first.weight": "avg_pool"})
class LocalResponse(Ends):
    """Neighbouring channels normalise each other, so none may go."""

    def __init__(self) -> None:
        super().__init__(6, 8)
        self.norm, self.conv = nn.LocalResponseNorm(3), nn.Conv2d(6, 8, 1)

    def body(self, x):
        return self.conv(self.norm(x))


@case(TOKENS, [], {"first.weight": "layer_norm"})
class NormOfNonZero(Tokens):
    """LayerNorm after a sigmoid: absent channels would be counted as zeros but are one half, so nothing goes."""

    def __init__(self) -> None:
        super().__init__(16)
        self.norm = nn.LayerNorm(16)

    def body(self, x):
        return self.norm(torch.sigmoid(x))


@case(IMAGE, [16, 24])
class GlobalResponse(Ends):
    """Channels weighed by their share of all channels' energy (ConvNeXt V2)."""

    class Norm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gamma, self.beta = nn.Parameter(torch.ones(24)), nn.Parameter(torch.ones(24))

        def forward(self, x):
            energy = x.norm(p=2, dim=(1, 2), keepdim=True)
            share = energy / (energy.mean(-1, keepdim=True) + 1e-6)
            return x + self.gamma * (x * share) + self.beta

    def __init__(self) -> None:
        super().__init__(16)
        self.a, self.norm, self.b = nn.Linear(16, 24), self.Norm(), nn.Linear(24, 16)

    def body(self, x):
        return x + self.b(self.norm(F.gelu(self.a(x.permute(0, 2, 3, 1))))).permute(0, 3, 1, 2)


@case(IMAGE, [8, 12])
class WeightStandardised(Ends):
    """Kernels standardised by their own fan-in, absent inputs counted (NFNet, BiT)."""

    class Conv(nn.Conv2d):
        def forward(self, x):
            weight = F.batch_norm(
                self.weight.reshape(1, self.out_channels, -1), None, None, training=True, momentum=0.0
            )
            return F.conv2d(x, weight.reshape_as(self.weight), self.bias, self.stride, self.padding)

    def __init__(self) -> None:
        super().__init__(8, 12)
        self.conv = self.Conv(8, 12, 3)

    def body(self, x):
        return self.conv(x)


@case(IMAGE, [8, 12])
class WeightStandardisedInPieces(Ends):
    class Conv(nn.Conv2d):
        def forward(self, x):
            w = self.weight
            w = w - w.mean((1, 2, 3), keepdim=True)
            w = w / (w.std((1, 2, 3), keepdim=True) + 1e-5)
            return F.conv2d(x, w, self.bias)

    def __init__(self) -> None:
        super().__init__(8, 12)
        self.conv = self.Conv(8, 12, 3)

    def body(self, x):
        return self.conv(x)


@pytest.mark.parametrize("name", list(CASES))
def test_rule(name: str) -> None:
    show(CASES[name])
