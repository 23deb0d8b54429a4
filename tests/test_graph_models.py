"""Slim equals masked on the models that this must hold for exactly, and on what users write themselves."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cocktailsdk.graph import Coupling, couple, slim_module
from cocktailsdk.graph.compare import EXACT
from cocktailsdk.graph.cut import Cutter
from cocktailsdk.graph.verify_slim import verify_slim
from cocktailsdk.inspection.measuring import measured_flops


def some_removed(coupling: Coupling, ratio: float = 0.5, seed: int = 0) -> torch.Tensor:
    """Random units of every group, never all of one."""
    g = torch.Generator().manual_seed(seed)
    removed = torch.zeros(coupling.n_units, dtype=torch.bool)
    for group in coupling.groups:
        n = min(group.size - 1, max(1, round(ratio * group.size)))
        removed[group.start + torch.randperm(group.size, generator=g)[:n]] = True
    return removed


def check(model: nn.Module, *args: torch.Tensor, ratio: float = 0.5) -> tuple[Coupling, nn.Module]:
    """Slims a model, which proves it equal to the masked one, and compares the counts with the real ones."""
    coupling = couple(model, args)
    removed = some_removed(coupling, ratio)
    slim = slim_module(model, coupling, removed, args)
    assert sum(p.numel() for p in slim.parameters()) == coupling.params(removed)
    assert measured_flops(slim.eval(), args)[""] == coupling.flops(removed)
    return coupling, slim


@pytest.mark.parametrize(
    "name",
    ["resnet18", "resnet50", "mobilenetv3_small_050", "densenet121", "vit_tiny_patch16_224", "convnext_atto"],
)
def test_slim_equals_masked_on_timm(name: str) -> None:
    import timm

    torch.manual_seed(0)
    model = timm.create_model(name)
    side = 224 if name.endswith("_224") else 64  # convolutions take any size, and counts are exact for each
    coupling, _ = check(model, torch.randn(1, 3, side, side))
    kept = [k.where for k in coupling.kept]
    assert not coupling.unknown_ops
    assert len(kept) <= 2, kept  # the classifier, and nothing that matters


class Residual(nn.Module):
    """A residual sum, a concatenation, a depthwise convolution, and flatten before a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1)
        self.bn = nn.BatchNorm2d(12)
        self.inner = nn.Conv2d(12, 20, 3, padding=1)
        self.back = nn.Conv2d(20, 12, 1)
        self.side = nn.Conv2d(12, 6, 1)
        self.depthwise = nn.Conv2d(18, 18, 3, padding=1, groups=18)
        self.fc = nn.Linear(18 * 4 * 4, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn(self.stem(x)))
        x = x + self.back(F.relu(self.inner(x)))
        x = torch.cat([x, torch.sigmoid(self.side(x))], 1)
        x = F.gelu(self.depthwise(x))
        return self.fc(F.adaptive_avg_pool2d(x, 4).flatten(1))


def test_users_own_model() -> None:
    coupling, slim = check(Residual(), torch.randn(2, 3, 8, 8))
    assert type(slim) is Residual
    assert {g.size for g in coupling.groups} == {12, 20, 6}
    assert slim.depthwise.groups == slim.depthwise.in_channels == slim.depthwise.out_channels == 6 + 3
    assert slim.fc.in_features == 9 * 16


class LambdaShortcut(nn.Module):
    """The CIFAR ResNet's option-A shortcut as people write it: a lambda, with nothing to fix by name."""

    def __init__(self, width: int, wider: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, wider, 3, stride=2, padding=1)
        self.bn = nn.BatchNorm2d(wider)
        self.shortcut = Lambda(lambda x: F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, wider // 4, wider // 4), "constant", 0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.bn(self.conv(x)) + self.shortcut(x))


class Lambda(nn.Module):
    """A function as a module."""

    def __init__(self, fn) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fn(x)


def test_option_a_shortcut_loses_padded_channels_too() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3),
        LambdaShortcut(16, 32),
        LambdaShortcut(32, 64),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    )
    coupling, slim = check(model, torch.randn(1, 3, 16, 16))
    assert sum(g.size for g in coupling.groups) == 64  # every channel of the last stage is a unit, padded or not
    slim(torch.randn(4, 3, 20, 20)).sum().backward()  # other sizes, and gradients


def test_padding_that_cannot_be_rewritten_keeps_its_channels() -> None:
    class Inline(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 16, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.a(x)
            return (self.b(x) + F.pad(x, (0, 0, 0, 0, 4, 4))).relu()

    coupling, _ = check(nn.Sequential(Inline(), nn.Flatten(), nn.Linear(16 * 16, 3)), torch.randn(1, 3, 4, 4))
    assert [g.size for g in coupling.groups] == [8]


def test_the_model_is_left_as_it_was() -> None:
    model = Residual().train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    coupling = couple(model, (torch.randn(1, 3, 8, 8),))
    slim_module(model, coupling, some_removed(coupling), (torch.randn(1, 3, 8, 8),))
    assert model.training
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_a_slim_model_trains_saves_and_slims_again() -> None:
    x = torch.randn(4, 3, 8, 8)
    _, slim = check(Residual(), x)
    slim.train()(x).square().mean().backward()
    assert all(p.grad is not None for p in slim.parameters())
    again = couple(slim, (x,))
    slimmer = slim_module(slim, again, some_removed(again), (x,))
    assert again.n_units < couple(Residual(), (x,)).n_units
    slimmer.load_state_dict(slimmer.state_dict())


def test_equality_holds_to_rounding_in_float64() -> None:
    import timm

    model, x = timm.create_model("test_vit"), torch.randn(1, 3, 160, 160)
    coupling = couple(model, (x,))
    removed = some_removed(coupling)

    assert verify_slim(model, Cutter(coupling, coupling.trace, removed), (x,)).error < EXACT / 1e3
