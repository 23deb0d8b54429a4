"""Small residual networks for the presets, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["CifarResNet", "DigitsNet", "PadShortcut", "ResNet18"]


class PadShortcut(nn.Module):
    """The option-A shortcut of He et al. (2016): every second pixel, zero channels on both sides; no parameters.

    Attributes:
        before: Zero channels put before the input's.
        after: Zero channels put behind them.
    """

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.before = before
        self.after = after

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch wider half_h half_w"]:
        """Subsample and pad."""
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.before, self.after))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch norm, and a shortcut."""

    def __init__(self, inputs: int, planes: int, stride: int, shortcut: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, planes, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.shortcut: nn.Module
        if stride == 1 and inputs == planes:
            self.shortcut = nn.Identity()
        elif shortcut == "pad":
            pad = planes - inputs
            self.shortcut = PadShortcut(pad // 2, pad - pad // 2)
        else:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, planes, 1, stride, bias=False), nn.BatchNorm2d(planes))

    def forward(self, x: Float[Tensor, "batch inputs height width"]) -> Float[Tensor, "batch planes h w"]:
        """Residual sum, rectified."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return F.relu(y + self.shortcut(x))


def _stage(inputs: int, planes: int, blocks: int, stride: int, shortcut: str) -> nn.Sequential:
    first = BasicBlock(inputs, planes, stride, shortcut)
    return nn.Sequential(first, *(BasicBlock(planes, planes, 1, shortcut) for _ in range(blocks - 1)))


def _initialise(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


class CifarResNet(nn.Module):
    """The ResNet for 32x32 images of He et al. (2016), section 4.2, with option-A shortcuts.

    Args:
        depth: 6n + 2: 20, 32, 44, 56, …
        classes: Number of classes.
        channels: Channels of an image.
        widths: Channels of the three stages.
    """

    def __init__(
        self, depth: int = 20, classes: int = 10, channels: int = 3, widths: Sequence[int] = (16, 32, 64)
    ) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"depth must be 6n + 2 (8, 14, 20, 32, 44, 56, …), got {depth}")
        blocks = (depth - 2) // 6
        a, b, c = widths
        self.conv1 = nn.Conv2d(channels, a, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(a)
        self.layer1 = _stage(a, a, blocks, 1, "pad")
        self.layer2 = _stage(a, b, blocks, 2, "pad")
        self.layer3 = _stage(b, c, blocks, 2, "pad")
        self.linear = nn.Linear(c, classes)
        _initialise(self)

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        """Logits."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


class ResNet18(nn.Module):
    """ResNet-18 with the stem for 32x32 images: a 3x3 convolution and no pooling (11.2 M parameters).

    Args:
        classes: Number of classes.
        channels: Channels of an image.
        width: Channels of the first stage; the others have 2, 4 and 8 times as many.
    """

    def __init__(self, classes: int = 10, channels: int = 3, width: int = 64) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = _stage(width, width, 2, 1, "projection")
        self.layer2 = _stage(width, 2 * width, 2, 2, "projection")
        self.layer3 = _stage(2 * width, 4 * width, 2, 2, "projection")
        self.layer4 = _stage(4 * width, 8 * width, 2, 2, "projection")
        self.linear = nn.Linear(8 * width, classes)
        _initialise(self)

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        """Logits."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.linear(x.mean((2, 3)))


class DigitsNet(nn.Module):
    """ResNet-8 for 8x8 images of one channel: three residual blocks (about 78,000 parameters).

    Args:
        widths: Channels of the three blocks.
        classes: Number of classes.
    """

    def __init__(self, widths: Sequence[int] = (16, 32, 64), classes: int = 10) -> None:
        super().__init__()
        a, b, c = widths
        self.conv1 = nn.Conv2d(1, a, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(a)
        self.layer1 = BasicBlock(a, a, 1, "projection")
        self.layer2 = BasicBlock(a, b, 2, "projection")
        self.layer3 = BasicBlock(b, c, 2, "projection")
        self.linear = nn.Linear(c, classes)
        _initialise(self)

    def forward(self, x: Float[Tensor, "batch 1 height width"]) -> Float[Tensor, "batch classes"]:
        """Logits."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))
