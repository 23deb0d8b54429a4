"""What tests of patterns share: weights of all kinds, two small networks, and a pattern's whole way to bundles."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import cocktailsdk as cocktail
from cocktailsdk.graph import Weight


@st.composite
def weights(draw, most_outputs=9):
    """A weight of any op, with its number of input channels in a convolution group."""
    op = draw(st.sampled_from(["conv", "linear", "conv_transpose", "transposed linear", "experts"]))
    groups = draw(st.sampled_from([1, 1, 2, 3])) if op.startswith("conv") else 1
    inputs, outputs = draw(st.integers(1, 19)), draw(st.integers(1, most_outputs))
    kernel = draw(st.sampled_from([(1,), (3,), (2, 3)])) if op.startswith("conv") else ()
    if op == "conv":
        shape, out_axis, in_axis = (groups * outputs, inputs, *kernel), 0, 1
    elif op == "conv_transpose":
        shape, out_axis, in_axis = (groups * inputs, outputs, *kernel), 1, 0
    elif op == "linear":
        shape, out_axis, in_axis = (outputs, inputs), 0, 1
    elif op == "experts":
        shape, out_axis, in_axis = (3, inputs, outputs), 2, 1
    else:
        shape, out_axis, in_axis = (inputs, outputs), 1, 0
    return Weight(
        "w", "m", {"experts": "matmul"}.get(op, op.removeprefix("transposed ")), shape, out_axis, in_axis, groups, 0
    ), inputs


def entry(weight: Weight, group: int, position: tuple[int, ...], row: int, column: int) -> tuple[int, ...]:
    """Where a matrix's element lies in the weight, written out by hand."""
    if weight.op == "conv":
        return (group * (weight.shape[0] // weight.groups) + row, column, *position)
    if weight.op == "conv_transpose":
        return (group * (weight.shape[0] // weight.groups) + column, row, *position)
    if weight.op == "matmul":
        return (*position, column, row)
    return (row, column) if weight.out_axis == 0 else (column, row)


class ConvNet(nn.Module):
    """Convolutions, one of them in groups, two residual blocks and a shortcut that is not the identity."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(16)
        self.block1 = ConvBlock(16, 12, 16)
        self.block2 = ConvBlock(16, 12, 24)
        self.block3 = ConvBlock(24, 20, 24)
        self.fc = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.first(x)))
        return self.fc(self.block3(self.block2(self.block1(x))).mean((2, 3)))


class ConvBlock(nn.Module):
    def __init__(self, inputs: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, hidden, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.conv2 = nn.Conv2d(hidden, hidden, 3, padding=1, groups=2, bias=False)
        self.bn2 = nn.BatchNorm2d(hidden)
        self.conv3 = nn.Conv2d(hidden, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        return F.relu(self.bn3(self.conv3(y)) + self.shortcut(x))


class Transformer(nn.Module):
    """Two pre-norm blocks with four heads of four channels."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(12, 16)
        self.blocks = nn.ModuleList(TransformerBlock(16, 4, 24) for _ in range(2))
        self.norm = nn.LayerNorm(16)
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.fc(self.norm(x).mean(1))


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.head_dim = width // heads
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for f in (self.q, self.k, self.v))
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class TransformerBlock(nn.Module):
    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width), Attention(width, heads)
        self.norm2, self.fc1, self.fc2 = nn.LayerNorm(width), nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


MODELS = {"convolutions": (ConvNet, (2, 3, 6, 6)), "transformer": (Transformer, (2, 5, 12))}


def sparse(name: str, patterns: Sequence[str | cocktail.Pattern], seed: int = 0) -> cocktail.CocktailNet:
    """One of the small networks, with norms that do something, and its subnets."""
    make, shape = MODELS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make().eval()
        for m in model.modules():
            if isinstance(m, nn.BatchNorm2d | nn.LayerNorm):
                m.weight.data.uniform_(0.5, 2.0)
                m.bias.data.normal_()
            if isinstance(m, nn.BatchNorm2d):
                m.running_mean.normal_()
                m.running_var.uniform_(0.5, 2.0)
        return cocktail.sparsify(model, list(patterns), example_inputs=(torch.randn(shape),))


def assert_whole_way(net: cocktail.CocktailNet, folder: Path) -> cocktail.CocktailNet:
    """Switching, slimming, saving and loading agree bit by bit, or in what they compute.

    Returns:
        The net that was loaded.
    """
    (x,), _ = net.example
    net.save_pretrained(folder)
    loaded = cocktail.from_pretrained(folder, type(net.model)().eval())
    assert loaded.names == net.names
    assert loaded.patterns == net.patterns
    assert loaded.subnets() == net.subnets()
    for name in net.names:
        with torch.no_grad():
            with net.using(name), loaded.using(name):
                here, there = net.model.state_dict(), loaded.model.state_dict()
                assert list(here) == list(there)
                for key, value in here.items():
                    assert torch.equal(value, there[key]), (name, key)
                masked = net(x)
            for made in (net.slim(name), loaded.slim(name)):
                torch.testing.assert_close(made(x), masked, rtol=1e-4, atol=1e-4)
    assert net.active == "dense"
    return loaded
