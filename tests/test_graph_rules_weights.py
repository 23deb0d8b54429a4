"""Where weights come from: tied, shared, normalised, chosen, mixed, made by the network itself, or run in a loop."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from graph_cases import IMAGE, TOKENS, Ends, Table, Tokens, show
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import cocktailsdk as cocktail

case = CASES = Table()


def ids(n: int = 9, shape: tuple[int, ...] = (2, 6)):
    return lambda: (torch.randint(0, n, shape),)


@case(ids(), [16], {"embed.weight": "rows of an embedding"})
class TiedEmbedding(nn.Module):
    """An embedding that is also the classifier: its columns go once, for both uses."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.head = nn.Embedding(9, 16), nn.LayerNorm(16), nn.Linear(16, 9, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x):
        return self.head(self.norm(self.embed(x)))


@case(ids(), [16, 24])
class SummedEmbeddings(nn.Module):
    """Tokens, positions and types in one stream."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(9, 16, padding_idx=0), nn.Embedding(8, 16)
        self.types = nn.Parameter(torch.randn(2, 16))
        self.norm, self.a, self.b, self.last = (
            nn.LayerNorm(16), nn.Linear(16, 24), nn.Linear(24, 16), nn.Linear(16, 3),
        )  # fmt: skip

    def forward(self, x):
        t = torch.arange(x.shape[1])
        y = self.norm(self.tokens(x) + self.positions(t) + self.types[0])
        return self.last((y + self.b(F.gelu(self.a(y)))).mean(1))


@case(ids(), [16, 8], {"embed.weight": "rows of an embedding"})
class FactorisedEmbedding(nn.Module):
    """A narrow table, projected to the width and back (ALBERT)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up, self.down = nn.Embedding(9, 8), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        return F.linear(self.down(F.gelu(self.up(self.embed(x)))), self.embed.weight)


@case(IMAGE, [12])
class SharedModule(Ends):
    """Called twice: one axis, one set of labels."""

    def __init__(self) -> None:
        super().__init__(12)
        self.conv = nn.Conv2d(12, 12, 3, padding=1)

    def body(self, x):
        return self.conv(F.relu(self.conv(x)))


@case(IMAGE, [8, 8, 12])
class SharedBlock(Ends):
    """One block for two scales, each with a norm of its own."""

    def __init__(self) -> None:
        super().__init__(8)
        self.block = nn.Sequential(nn.Conv2d(8, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 8, 1))
        self.n, self.m = nn.BatchNorm2d(8), nn.BatchNorm2d(8)

    def body(self, x):
        return F.relu(self.n(self.block(x)).mean((2, 3), keepdim=True) + self.m(self.block(F.avg_pool2d(x, 2))))


@case(TOKENS, [16, 6])
class TiedTranspose(Tokens):
    """An autoencoder whose decoder is the encoder's transpose."""

    def __init__(self) -> None:
        super().__init__(16)
        self.encoder, self.bias = nn.Linear(16, 6), nn.Parameter(torch.zeros(16))

    def body(self, x):
        return F.linear(F.relu(self.encoder(x)), self.encoder.weight.t(), self.bias)


@case(TOKENS, [16, 16, 4])
class LowRank(Tokens):
    """A weight and its low-rank addition: the rank is a width like any other."""

    def __init__(self) -> None:
        super().__init__(16)
        self.base, self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 4, bias=False), nn.Linear(4, 16, bias=False)

    def body(self, x):
        return self.base(x) + 2.0 * self.b(self.a(x))


@case(TOKENS, [16, 16])
class MergedLowRank(Tokens):
    """The addition made to the weight as it runs: rank and width, and the new output channels."""

    class Linear(nn.Linear):
        def __init__(self) -> None:
            super().__init__(16, 16)
            self.a, self.b = nn.Parameter(torch.randn(4, 16)), nn.Parameter(torch.randn(16, 4))

        def forward(self, x):
            return F.linear(x, self.weight + self.b @ self.a, self.bias)

    def __init__(self) -> None:
        super().__init__(16)
        self.linear = self.Linear()

    def body(self, x):
        return F.relu(self.linear(x))


@case(IMAGE, [8, 12])
class WeightNorm(Ends):
    """Kernels of unit norm by output channel: absent inputs add nothing to a norm, absent outputs have no scale."""

    def __init__(self) -> None:
        super().__init__(8, 12)
        self.conv = parametrizations.weight_norm(nn.Conv2d(8, 12, 3))

    def body(self, x):
        return self.conv(x)


@case(IMAGE, [8, 12])
class WeightNormOfOld(Ends):
    """The same by hooks, before parametrizations."""

    def __init__(self) -> None:
        super().__init__(8, 12)
        import warnings

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.conv = nn.utils.weight_norm(nn.Conv2d(8, 12, 3))

    def body(self, x):
        return self.conv(x)


@case(TOKENS, [16, 10, 10])
class SpectralNorm(Tokens):
    """Divided by the largest singular value, a product with two vectors that lose entries too."""

    def __init__(self) -> None:
        super().__init__(16, 10)
        self.linear, self.out = parametrizations.spectral_norm(nn.Linear(16, 10)), nn.Linear(10, 10)

    def body(self, x):
        return self.out(F.relu(self.linear(x)))


@case(TOKENS, [16, 10, 10])
class Masked(Tokens):
    """A weight times a constant mask, and one behind a parametrization."""

    class Positive(nn.Module):
        def forward(self, w):
            return w.exp()

    def __init__(self) -> None:
        super().__init__(16, 10)
        self.w = nn.Parameter(torch.randn(10, 16))
        self.register_buffer("mask", (torch.rand(10, 16) > 0.3).float())
        self.positive = nn.Linear(10, 10)
        parametrize.register_parametrization(self.positive, "weight", self.Positive())

    def body(self, x):
        return self.positive(F.relu(F.linear(x, self.w * self.mask)))


@case(((2, 6, 12), (2, 6, 12)), [16, 10], {"gate.weight": "softmax", "up": "einsum"})
class StackedExperts(nn.Module):
    """Experts in one tensor, all of them run, and mixed by a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.gate, self.last = nn.Linear(12, 16), nn.Linear(12, 4), nn.Linear(16, 3)
        self.up, self.down = nn.Parameter(torch.randn(4, 16, 10)), nn.Parameter(torch.randn(4, 10, 16))

    def forward(self, x, y):
        x, gate = self.first(x), self.gate(y).softmax(-1)
        hidden = F.gelu(torch.einsum("bnc,ech->bneh", x, self.up))
        return self.last((x + torch.einsum("bneh,ehc,bne->bnc", hidden, self.down, gate)).mean(1))


@case(TOKENS, [16, 10, 10, 10], {"experts.gate.weight": "softmax"})
class ExpertsByTopK(Tokens):
    """Each token goes to two experts of three; all run, and the others weigh nothing."""

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Linear(16, 3, bias=False)
            self.up = nn.ModuleList(nn.Linear(16, 10) for _ in range(3))
            self.down = nn.ModuleList(nn.Linear(10, 16) for _ in range(3))

        def forward(self, x):
            values, chosen = self.gate(x).softmax(-1).topk(2, -1)
            weight = torch.zeros(*x.shape[:-1], 3, dtype=x.dtype).scatter(-1, chosen, values)
            return sum(
                weight[..., i : i + 1] * down(F.silu(up(x)))
                for i, (up, down) in enumerate(zip(self.up, self.down, strict=True))
            )

    def __init__(self) -> None:
        super().__init__(16)
        self.experts = self.Experts()

    def body(self, x):
        return x + self.experts(x)


@case(IMAGE, [6], {"make.weight": "could not be fixed", "first.weight": "conv2d"})
class Hypernetwork(Ends):
    """A kernel made from the image itself: what it makes it of goes, the kernel does not."""

    def __init__(self) -> None:
        super().__init__(8)
        self.hidden, self.make = nn.Conv2d(4, 6, 1), nn.Linear(6, 8 * 5)
        self.last = nn.Linear(5, 3)

    def forward(self, x):
        kernel = self.make(self.hidden(x).mean((0, 2, 3))).view(5, 8, 1, 1)
        return self.last(F.conv2d(self.first(x), kernel).mean((2, 3)))


@case(IMAGE, [8, 12], {"route.weight": "softmax"})
class DynamicConvolution(Ends):
    """Kernels mixed by attention over the image (CondConv): rows and columns of the bank's kernels."""

    def __init__(self) -> None:
        super().__init__(8, 12)
        self.route, self.bank = nn.Linear(8, 3), nn.Parameter(torch.randn(3, 12, 8, 1, 1))

    def body(self, x):
        mix = self.route(x.mean((2, 3))).softmax(-1)
        return torch.einsum("nchw,kdc,nk->ndhw", x, self.bank.flatten(2), mix)


@case(IMAGE, [12, 5, 7], flops=False)
class ConvolutionsAndLstm(nn.Module):
    """A position of the hidden state goes from all gates and both directions."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.first = nn.Conv2d(4, 12, 3, padding=1), nn.Conv2d(12, 5, (8, 1))
        self.lstm, self.last = nn.LSTM(5, 7, batch_first=True, bidirectional=True), nn.Linear(14, 3)

    def forward(self, x):
        x = self.first(F.relu(self.a(x))).squeeze(2).transpose(1, 2)
        return self.last(self.lstm(x)[0][:, -1])


@case(TOKENS, [16, 7, 10], flops=False)
class Gru(Tokens):
    def __init__(self) -> None:
        super().__init__(16, 10)
        self.gru, self.out = nn.GRU(16, 7, num_layers=2), nn.Linear(7, 10)

    def body(self, x):
        return self.out(self.gru(x)[0])


@case(TOKENS, [7], flops=False)
class RecurrentCell(Tokens):
    """A loop over a cell made of layers is a module called many times: its state is a width like any other."""

    def __init__(self) -> None:
        super().__init__(12, 7)
        self.x, self.h, self.start = nn.Linear(12, 7), nn.Linear(7, 7), nn.Parameter(torch.zeros(7))
        del self.first

    def forward(self, x):
        state, states = self.start.expand(x.shape[0], -1), []
        for t in range(x.shape[1]):
            state = torch.tanh(self.x(x[:, t]) + self.h(state))
            states.append(state)
        return self.last(torch.stack(states, 1).mean(1))


@pytest.mark.parametrize("name", list(CASES))
def test_rule(name: str) -> None:
    show(CASES[name])


def test_slimming_a_model_in_training_takes_no_step_of_power_iteration() -> None:
    model = CASES["SpectralNorm"].make().train()
    args = CASES["SpectralNorm"].inputs()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    slim = cocktail.slim(model, args, round_to=1)
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    assert model.training and slim.training and slim.linear.parametrizations.weight[0].training
    left = slim.linear.parametrizations.weight[0]._u
    assert len(left) < 10 and set(left.tolist()) <= set(before["linear.parametrizations.weight.0._u"].tolist())
