"""Convolutions and what stands around them: grouped, transposed, padded, pooled, resized, shuffled, flattened."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from graph_cases import IMAGE, Ends, Table, show
from torch import nn

case = CASES = Table()


@case((2, 4, 16), [8, 12])
class OneDimensional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.bn, self.b = nn.Conv1d(4, 8, 3), nn.BatchNorm1d(8), nn.Conv1d(8, 12, 3, dilation=2)
        self.last = nn.Linear(12, 3)

    def forward(self, x):
        x = F.max_pool1d(F.relu(self.bn(self.a(x))), 2)
        return self.last(F.adaptive_avg_pool1d(self.b(x), 1).squeeze(-1))


@case((2, 2, 5, 6, 6), [8, 6])
class ThreeDimensional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.bn, self.b = nn.Conv3d(2, 8, 3, padding=1), nn.BatchNorm3d(8), nn.Conv3d(8, 6, 3)
        self.last = nn.Linear(6, 3)

    def forward(self, x):
        x = F.max_pool3d(F.relu(self.bn(self.a(x))), (1, 2, 2))
        return self.last(F.adaptive_avg_pool3d(self.b(x), 1).flatten(1))


@case(IMAGE, [8, 10])
class TransposedConvolution(Ends):
    def __init__(self) -> None:
        super().__init__(8, 10)
        self.up = nn.ConvTranspose2d(8, 10, 2, stride=2)

    def body(self, x):
        return F.relu(self.up(x))


@case(IMAGE, [6, 4])
class GroupedConvolution(Ends):
    """Every group loses the same positions, so that all stay equally wide."""

    def __init__(self) -> None:
        super().__init__(18, 12)
        self.conv = nn.Conv2d(18, 12, 3, groups=3)

    def body(self, x):
        return self.conv(x)


@case(IMAGE, [12])
class DepthwiseMultiplier(Ends):
    """Two outputs for each input channel: all three go together."""

    def __init__(self) -> None:
        super().__init__(12, 24)
        self.conv = nn.Conv2d(12, 24, 3, groups=12)

    def body(self, x):
        return self.conv(x)


@case(IMAGE, [12, 16])
class DepthwiseSeparable(Ends):
    def __init__(self) -> None:
        super().__init__(12, 16)
        self.depthwise, self.pointwise = nn.Conv2d(12, 12, 3, groups=12, bias=False), nn.Conv2d(12, 16, 1)
        self.n, self.m = nn.BatchNorm2d(12), nn.BatchNorm2d(16)

    def body(self, x):
        return F.relu6(self.m(self.pointwise(F.relu6(self.n(self.depthwise(x))))))


@case(IMAGE, [12])
class DepthwiseTransposed(Ends):
    """Each channel upsampled by a kernel of its own."""

    def __init__(self) -> None:
        super().__init__(12)
        self.up = nn.ConvTranspose2d(12, 12, 2, stride=2, groups=12)

    def body(self, x):
        return self.up(x)


@case(IMAGE, [12], {"up.weight": "several outputs of each channel"})
class DepthwiseTransposedMultiplier(Ends):
    """Two outputs for each channel: all three go together, and the weight's axis of two stays."""

    def __init__(self) -> None:
        super().__init__(12, 24)
        self.up = nn.ConvTranspose2d(12, 24, 2, stride=2, groups=12)

    def body(self, x):
        return F.relu(self.up(x))


@case(IMAGE, [6, 4])
class GroupedTransposed(Ends):
    """Every group loses the same positions, at both ends."""

    def __init__(self) -> None:
        super().__init__(18, 12)
        self.up = nn.ConvTranspose2d(18, 12, 3, groups=3, stride=2)

    def body(self, x):
        return self.up(x)


@case(IMAGE, [8, 12, 6])
class UNet(Ends):
    """Down, up by interpolation, and a skip that is concatenated."""

    def __init__(self) -> None:
        super().__init__(8, 6)
        self.down, self.out = nn.Conv2d(8, 12, 3, stride=2, padding=1), nn.Conv2d(20, 6, 3, padding=1)
        self.up = nn.Upsample(scale_factor=2, mode="bilinear")

    def body(self, x):
        y = F.relu(self.down(x))
        return self.out(torch.cat([x, self.up(y)], 1)) + F.interpolate(self.out(torch.cat([x, self.up(y)], 1)), (8, 8))


@case(IMAGE, [8, 10])
class Pooled(Ends):
    def __init__(self) -> None:
        super().__init__(8, 10)
        self.a, self.b = nn.Conv2d(8, 10, 1), nn.Conv2d(8, 10, 1)

    def body(self, x):
        y = self.a(F.adaptive_max_pool2d(x, 3)) + self.b(F.adaptive_avg_pool2d(x, 3))
        return F.avg_pool2d(y, 2) + F.max_pool2d(y, 2) + F.lp_pool2d(y, 2, 2)


@case(IMAGE, [8, 10, 6])
class PaddedOtherwise(Ends):
    """Borders of space repeat values of the same channel."""

    def __init__(self) -> None:
        super().__init__(8, 6)
        self.a = nn.Conv2d(8, 10, 3, padding=1, padding_mode="reflect")
        self.b = nn.Conv2d(10, 6, 3, padding=1, padding_mode="circular")
        self.edge, self.zero = nn.ReplicationPad2d(1), nn.ZeroPad2d((1, 0, 2, 0))

    def body(self, x):
        return self.b(self.zero(self.a(self.edge(x))))


@case(IMAGE, [8, 12])
class Flattened(nn.Module):
    """A linear layer over channels and positions loses all positions of a channel."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.fc, self.last = nn.Conv2d(4, 8, 3, stride=2), nn.Linear(72, 12), nn.Linear(12, 3)

    def forward(self, x):
        return self.last(F.relu(self.fc(torch.flatten(F.relu(self.a(x)), 1))))


@case(IMAGE, [8, 5])
class PixelShuffle(Ends):
    def __init__(self) -> None:
        super().__init__(8, 5)
        self.up, self.shuffle = nn.Conv2d(8, 20, 1), nn.PixelShuffle(2)

    def body(self, x):
        return self.shuffle(self.up(x))


@case(IMAGE, [8, 5])
class ShuffledBothWays(Ends):
    """Positions to channels and back, by PyTorch's own modules."""

    def __init__(self) -> None:
        super().__init__(8, 5)
        self.fold, self.conv, self.unfold = nn.PixelUnshuffle(2), nn.Conv2d(32, 20, 1), nn.PixelShuffle(2)

    def body(self, x):
        return self.unfold(self.conv(self.fold(x)))


@case(IMAGE, [6, 16])
class ChannelShuffle(Ends):
    """Two rows of six: as many columns as can go without tearing the shuffle."""

    def __init__(self) -> None:
        super().__init__(12, 16)
        self.conv = nn.Conv2d(12, 16, 1)

    def body(self, x):
        n, c, h, w = x.shape
        x = x.reshape(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        return self.conv(x)


@case(IMAGE, [6, 10])
class ShuffledByModule(Ends):
    """Two rows of six: as many columns as can go without tearing the shuffle."""

    def __init__(self) -> None:
        super().__init__(12, 10)
        self.shuffle, self.conv = nn.ChannelShuffle(2), nn.Conv2d(12, 10, 1)

    def body(self, x):
        return self.conv(self.shuffle(x))


@case(IMAGE, [8, 9])
class WindowsAsColumns(Ends):
    """unfold and fold: the positions of a kernel go with their channel."""

    def __init__(self) -> None:
        super().__init__(8, 9)
        self.mix = nn.Linear(72, 81)

    def body(self, x):
        columns = F.unfold(x, 3, padding=1)
        return F.fold(self.mix(columns.transpose(1, 2)).transpose(1, 2), (8, 8), 3, padding=1)


@case(IMAGE, [12, 24])
class ConvNeXt(Ends):
    """A block with a scale for each layer, and stochastic depth."""

    def __init__(self) -> None:
        super().__init__(12)
        from torchvision.ops import StochasticDepth

        self.depthwise, self.norm = nn.Conv2d(12, 12, 7, padding=3, groups=12), nn.LayerNorm(12)
        self.a, self.b, self.drop = nn.Linear(12, 24), nn.Linear(24, 12), StochasticDepth(0.5, "row")
        self.gamma = nn.Parameter(torch.full((12, 1, 1), 1e-6))

    def body(self, x):
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        return x + self.drop(self.gamma * self.b(F.gelu(self.a(y))).permute(0, 3, 1, 2))


@pytest.mark.parametrize("name", list(CASES))
def test_rule(name: str) -> None:
    show(CASES[name])
