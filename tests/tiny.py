"""A small convolutional network and its coupling written by hand, so that tests of masks need no graph."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cocktailsdk.api import CocktailNet
from cocktailsdk.graph import STAYS, Contraction, Coupling, Group, Producer, Touch, Weight
from cocktailsdk.net.target_modules import Selection
from cocktailsdk.patterns import Pattern, make_all_masks, resolve_patterns

WIDTHS = (8, 16)
IMAGE = 6


class TinyNet(nn.Module):
    """A first convolution, a residual block on the wider stream, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        a, b = WIDTHS
        self.first = nn.Conv2d(3, a, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(a)
        self.widen = nn.Conv2d(a, b, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(b)
        self.inner = nn.Conv2d(b, b, 1, bias=True)
        self.fc = nn.Linear(b, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.first(x)))
        x = torch.relu(self.bn2(self.widen(x)))
        x = x + self.inner(x)
        return self.fc(x.mean((2, 3)))


def tiny_coupling(model: nn.Module) -> Coupling:
    """What ``couple`` finds of it: ``widen`` and ``inner`` make the same channels."""
    a, b = WIDTHS
    ua, ub = torch.arange(a), torch.arange(a, a + b)
    area = IMAGE * IMAGE

    def weight(name: str, op: str, macs: int, role: str = "") -> Weight:
        return Weight(
            f"{name}.weight", name, op, tuple(model.get_parameter(f"{name}.weight").shape), 0, 1, 1, macs, role
        )

    def rows(u: Tensor, n: int) -> Tensor:
        return u.reshape(-1, *[1] * (n - 1))

    def columns(u: Tensor, n: int) -> Tensor:
        return u.reshape(1, -1, *[1] * (n - 2))

    norm = ("weight", "bias", "running_mean", "running_var")
    fields = {
        "first.weight": (rows(ua, 4),),
        **{f"bn1.{n}": (ua,) for n in norm},
        "widen.weight": (rows(ub, 4), columns(ua, 4)),
        **{f"bn2.{n}": (ub,) for n in norm},
        "inner.weight": (rows(ub, 4), columns(ub, 4)),
        "inner.bias": (ub,),
        "fc.weight": (columns(ub, 2),),
    }
    touches_a = (
        Touch("first.weight", (0,), "rows"),
        *(Touch(f"bn1.{n}", (0,), "entries") for n in norm),
        Touch("widen.weight", (1,), "columns"),
    )
    touches_b = (
        Touch("widen.weight", (0,), "rows"),
        *(Touch(f"bn2.{n}", (0,), "entries") for n in norm),
        Touch("inner.weight", (0,), "rows"),
        Touch("inner.weight", (1,), "columns"),
        Touch("inner.bias", (0,), "entries"),
        Touch("fc.weight", (1,), "columns"),
    )
    macs = {"first": 27 * a * area, "widen": 9 * a * b * area, "inner": b * b * area, "fc": 5 * b}
    return Coupling(
        weights=(
            weight("first", "conv", macs["first"], "first convolution"),
            weight("widen", "conv", macs["widen"]),
            weight("inner", "conv", macs["inner"]),
            weight("fc", "linear", macs["fc"], "classifier"),
        ),
        producers=(
            Producer("first.weight", 0, ua),
            Producer("widen.weight", 0, ub),
            Producer("inner.weight", 0, ub),
            Producer("fc.weight", 0, torch.full((5,), STAYS)),
        ),
        groups=(
            Group("first", 0, a, ("first.weight",), touches_a),
            Group("widen", a, a + b, ("widen.weight", "inner.weight"), touches_b),
        ),
        fields=fields,
        kept=(),
        contractions=(
            Contraction("first", "first.weight", macs["first"]),
            Contraction("widen", "widen.weight", macs["widen"]),
            Contraction("inner", "inner.weight", macs["inner"]),
            Contraction("fc", "fc.weight", macs["fc"]),
        ),
        shapes={n: tuple(p.shape) for n, p in model.named_parameters()},
    )


def tiny_net(
    patterns: str | Pattern | list[str | Pattern] | tuple[str, ...] = ("unstructured", "n:m", "channel"),
    seed: int = 0,
) -> CocktailNet:
    """The small network with all its masks made, as ``sparsify`` would."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = TinyNet()
        for m in model.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.weight.data.uniform_(0.5, 2.0)
                m.bias.data.normal_()
                m.running_mean.normal_()
                m.running_var.uniform_(0.5, 2.0)
        x = torch.randn(2, 3, IMAGE, IMAGE)
    model.eval()
    chosen = resolve_patterns(patterns)
    coupling, selection = tiny_coupling(model), Selection()
    net = CocktailNet(model, chosen, coupling, selection, ((x,), {}), {})
    for name, mask in make_all_masks(chosen, coupling, net.eligible, net.umg().values).items():
        net.set_mask(name, mask)
    return net
